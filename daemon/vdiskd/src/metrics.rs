//! Counters for monitoring: OpenMetrics text over HTTP, on a unix socket or on a listening socket that systemd passes.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};
use rustix::net::{AddressFamily, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use vdisk_exports::{KindCounters, QueueCounters, RequestClass};
use vdisk_io::ThreadStatsSnapshot;

use crate::control::Handle;

/// The name of the socket that systemd passes (FileDescriptorName= of vdiskd-metrics.socket).
pub const SOCKET_NAME: &str = "metrics";

/// Scrapes at a time; more wait.
const CONNECTIONS: usize = 8;

/// How long a client may take for its question.
const PATIENCE: Duration = Duration::from_secs(5);

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Latencies are counted up to these powers of two of nanoseconds: from 4 µs to 17 s.
const BUCKETS: [usize; 12] = [12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34];

type Labels<'a> = [(&'a str, &'a str)];

/// Name, help, and how it is found in counters.
type Counting<T> = (&'static str, &'static str, fn(&T) -> u64);

/// A number with a type of its own.
struct Value(f64, MetricType);

impl EncodeMetric for Value {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> std::fmt::Result {
        match self.1 {
            MetricType::Counter => {
                encoder.encode_counter::<NoLabelSet, _, u64>(&(self.0 as u64), None)
            }
            _ => encoder.encode_gauge(&self.0),
        }
    }

    fn metric_type(&self) -> MetricType {
        self.1
    }
}

/// One metric, with a value for each set of labels.
struct Family<'a> {
    encoder: MetricEncoder<'a>,
    kind: MetricType,
}

impl Family<'_> {
    fn add(&mut self, labels: &Labels<'_>, value: f64) -> std::fmt::Result {
        let value = Value(value, self.kind);
        value.encode(self.encoder.encode_family(&labels.to_vec())?)
    }
}

fn family<'a>(
    encoder: &'a mut DescriptorEncoder<'_>,
    kind: MetricType,
    name: &'a str,
    help: &'a str,
    unit: Option<&'a Unit>,
) -> Result<Family<'a>, std::fmt::Error> {
    let encoder = encoder.encode_descriptor(name, help, unit, kind)?;
    Ok(Family { encoder, kind })
}

/// Looks at everything when it is asked.
struct Everything(Handle);

impl std::fmt::Debug for Everything {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Everything")
    }
}

/// An export, summed over its queues.
struct Counted {
    id: String,
    node: String,
    clients: u32,
    is_slow: bool,
    sum: QueueCounters,
}

impl Everything {
    fn exports(&self) -> Vec<Counted> {
        let exports: Vec<_> = self.0.world().exports.clone().into_iter().collect();
        let counted = exports.into_iter().map(|(id, export)| {
            let mut sum = QueueCounters::default();
            for queue in export.server.statistics() {
                sum.add(&queue);
            }
            Counted {
                id,
                node: export.node(),
                clients: export.server.clients(),
                is_slow: export.slow_reason().is_some(),
                sum,
            }
        });
        counted.collect()
    }

    fn encode_exports(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        use MetricType::{Counter, Gauge};
        let exports = self.exports();
        let mut f = family(
            encoder,
            Gauge,
            "export_clients",
            "Front-ends connected",
            None,
        )?;
        for e in &exports {
            f.add(&[("export", &e.id), ("node", &e.node)], e.clients.into())?;
        }
        let help = "Whether requests need the slow path";
        let mut f = family(encoder, Gauge, "export_slow", help, None)?;
        for e in &exports {
            f.add(&[("export", &e.id)], f64::from(u8::from(e.is_slow)))?;
        }
        let of_kinds: [Counting<KindCounters>; 3] = [
            ("export_requests", "Requests answered", |k| k.requests),
            ("export_failed_requests", "Requests that failed", |k| {
                k.failed
            }),
            ("export_io_bytes", "Bytes of requests that succeeded", |k| {
                k.bytes
            }),
        ];
        for (name, help, value) in of_kinds {
            let mut f = family(encoder, Counter, name, help, None)?;
            for e in &exports {
                for class in RequestClass::ALL {
                    let labels = [("export", e.id.as_str()), ("operation", class.name())];
                    f.add(&labels, value(e.sum.kind(class)) as f64)?;
                }
            }
        }
        let of_queues: [Counting<QueueCounters>; 5] = [
            (
                "export_fast_requests",
                "Requests that went to the storage at once",
                |q| q.fast,
            ),
            (
                "export_slow_requests",
                "Requests that needed the slow path",
                |q| q.slow,
            ),
            ("export_kicks", "Notifications from the guest", |q| q.kicks),
            ("export_interrupts", "Notifications to the guest", |q| {
                q.interrupts
            }),
            ("export_poll_hits", "Polls that found requests", |q| {
                q.poll_hits
            }),
        ];
        for (name, help, value) in of_queues {
            let mut f = family(encoder, Counter, name, help, None)?;
            for e in &exports {
                f.add(&[("export", &e.id)], value(&e.sum) as f64)?;
            }
        }
        let mut latencies = encoder.encode_descriptor(
            "export_latency",
            "Time from when a request was seen to its answer",
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for e in &exports {
            for class in RequestClass::ALL {
                let kind = e.sum.kind(class);
                let counts = &kind.latency.0;
                let mut from = 0;
                let mut buckets: Vec<(f64, u64)> = Vec::new();
                for power in BUCKETS {
                    let count = counts[from..=power].iter().sum();
                    buckets.push(((1u64 << power) as f64 / 1e9, count));
                    from = power + 1;
                }
                buckets.push((f64::MAX, counts[from..].iter().sum()));
                let total = counts.iter().sum();
                let labels = vec![("export", e.id.as_str()), ("operation", class.name())];
                let mut encoder = latencies.encode_family(&labels)?;
                let sum = kind.latency_ns as f64 / 1e9;
                encoder.encode_histogram::<NoLabelSet>(sum, total, &buckets, None)?;
            }
        }
        Ok(())
    }

    fn encode_threads(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        let threads: Vec<_> = {
            let world = self.0.world();
            let jobs = world.jobs_thread.iter();
            let all = world.threads.values().chain(jobs);
            all.map(|t| (t.name().to_owned(), t.statistics())).collect()
        };
        // Whole seconds would say little: a gauge has fractions, and only grows.
        let help = "Time that the I/O thread has spent working, polling and sleeping";
        let unit = Unit::Seconds;
        let mut f = family(
            encoder,
            MetricType::Gauge,
            "iothread_time",
            help,
            Some(&unit),
        )?;
        for (name, s) in &threads {
            for (mode, ns) in [
                ("working", s.working_ns),
                ("polling", s.polling_ns),
                ("sleeping", s.sleeping_ns),
            ] {
                f.add(&[("iothread", name), ("mode", mode)], ns as f64 / 1e9)?;
            }
        }
        let counters: [Counting<ThreadStatsSnapshot>; 2] = [
            (
                "iothread_operations",
                "Operations handed to the engine",
                |s| s.operations,
            ),
            (
                "iothread_syscalls",
                "System calls of the loop and its engine",
                |s| s.syscalls,
            ),
        ];
        for (name, help, value) in counters {
            let mut f = family(encoder, MetricType::Counter, name, help, None)?;
            for (name, s) in &threads {
                f.add(&[("iothread", name)], value(s) as f64)?;
            }
        }
        Ok(())
    }

    fn encode_rest(&self, encoder: &mut DescriptorEncoder<'_>) -> std::fmt::Result {
        use MetricType::Gauge;
        let (nodes, jobs, problems) = {
            let world = self.0.world();
            let names: Vec<String> = world.graph.names().map(str::to_owned).collect();
            let nodes = names.iter().filter_map(|n| world.graph.node(n).ok());
            let nodes: Vec<_> = nodes.collect();
            let jobs: Vec<_> = world.jobs.values().cloned().collect();
            (nodes, jobs, world.all_problems().len())
        };
        let unit = Unit::Bytes;
        let mut f = family(encoder, Gauge, "node_size", "Size of a node", Some(&unit))?;
        for node in &nodes {
            let labels = [("node", node.name()), ("driver", node.driver_name())];
            f.add(&labels, node.size() as f64)?;
        }
        for (name, help, which) in [
            ("job_done", "What a job has done", 0),
            ("job_total", "What a job has to do", 1),
        ] {
            let mut f = family(encoder, Gauge, name, help, Some(&unit))?;
            for job in &jobs {
                let progress: [u64; 2] = job.state.progress().into();
                let operation = job.options.kind.name();
                f.add(
                    &[("job", job.id()), ("operation", operation)],
                    progress[which] as f64,
                )?;
            }
        }
        let help = "What is amiss: see vdiskctl status";
        family(encoder, Gauge, "problems", help, None)?.add(&[], problems as f64)?;
        let mut f = family(
            encoder,
            Gauge,
            "build_info",
            "The version of the daemon",
            None,
        )?;
        f.add(&[("version", env!("CARGO_PKG_VERSION"))], 1.0)
    }
}

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> std::fmt::Result {
        self.encode_exports(&mut encoder)?;
        self.encode_threads(&mut encoder)?;
        self.encode_rest(&mut encoder)
    }
}

/// Everything as OpenMetrics text.
fn render(control: &Handle) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("vdiskd");
    registry.register_collector(Box::new(Everything(control.clone())));
    let mut out = String::new();
    text::encode(&mut out, &registry)?;
    Ok(out)
}

async fn answer(
    control: Handle,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let plain = |status, text: &str| {
        let mut response = Response::new(Full::from(text.to_owned()));
        *response.status_mut() = status;
        response
    };
    let path = request.uri().path();
    if path != "/metrics" && path != "/" {
        return Ok(plain(StatusCode::NOT_FOUND, "there is /metrics\n"));
    }
    if request.method() != Method::GET {
        return Ok(plain(StatusCode::METHOD_NOT_ALLOWED, "use GET\n"));
    }
    let Ok(text) = render(&control) else {
        return Ok(plain(StatusCode::INTERNAL_SERVER_ERROR, "cannot be told\n"));
    };
    let mut response = plain(StatusCode::OK, &text);
    let kind = hyper::header::HeaderValue::from_static(OPEN_METRICS);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(response)
}

async fn serve_one(control: Handle, stream: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|request| answer(control.clone(), request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a client of the metrics went away");
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

fn listener(fd: OwnedFd) -> std::io::Result<Listener> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(match sockopt::socket_domain(&fd)? {
        AddressFamily::UNIX => Listener::Unix(UnixListener::from_std(fd.into())?),
        _ => Listener::Tcp(TcpListener::from_std(fd.into())?),
    })
}

/// A socket at a path, in place of one that an earlier daemon has left.
fn make(path: &Path) -> std::io::Result<Listener> {
    if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::AddrInUse,
                "another process listens there: give each instance a socket of its own",
            ));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(Listener::Unix(listener))
}

async fn serve(control: Handle, listener: Listener) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        let control = control.clone();
        let accepted = match &listener {
            Listener::Unix(l) => l.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(PATIENCE * 2, serve_one(control, stream)).await;
                    drop(place);
                })
            }),
            Listener::Tcp(l) => l.accept().await.map(|(stream, _)| {
                tokio::spawn(async move {
                    let _ = tokio::time::timeout(PATIENCE * 2, serve_one(control, stream)).await;
                    drop(place);
                })
            }),
        };
        if let Err(error) = accepted {
            tracing::warn!(%error, "cannot accept a client of the metrics");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }
}

/// Serves on a socket that was passed, and on one at a path. Guests are served also if that cannot be.
pub fn start(control: &Handle, passed: Option<OwnedFd>, path: Option<&Path>) {
    let passed = passed.map(listener);
    for made in [passed, path.map(make)].into_iter().flatten() {
        match made {
            Ok(listener) => {
                tokio::spawn(serve(control.clone(), listener));
            }
            Err(error) => {
                let path = path.map(|p| p.display().to_string());
                tracing::error!(path, %error, "metrics cannot be served");
            }
        }
    }
}
