//! The D-Bus interface and vdiskctl: the documented XML is what the daemon says, foreign clients can use it,
//! and every mistake gets an error that names it and changes nothing.

use std::collections::BTreeSet;
use std::process::Command;

use serde_json::json;
use vdisk_qemu_tests::{Daemon, Qmp, vdiskctl_binary, wait_for};

const MIB: u64 = 1 << 20;

fn busctl(daemon: &Daemon, args: &[&str]) -> Result<String, String> {
    let out = Command::new("busctl")
        .arg(format!("--address={}", daemon.bus_address()))
        .args(args)
        .output()
        .expect("busctl is installed: run 'make setup'");
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&out.stderr).into_owned())
    }
}

/// One line for each member of an interface, with everything that matters to a client.
fn members(xml: &str, interface: &str) -> BTreeSet<String> {
    let options = roxmltree::ParsingOptions {
        allow_dtd: true,
        ..Default::default()
    };
    let doc = roxmltree::Document::parse_with_options(xml, options).expect("it is XML");
    let root = doc
        .descendants()
        .find(|n| n.has_tag_name("interface") && n.attribute("name") == Some(interface))
        .unwrap_or_else(|| panic!("no interface {interface} in {xml}"));
    let annotation = |n: &roxmltree::Node<'_, '_>| {
        n.children()
            .filter(|c| c.has_tag_name("annotation"))
            .map(|c| c.attribute("value").unwrap_or_default().to_owned())
            .filter(|v| v != "true")
            .collect::<String>()
    };
    let member = |n: roxmltree::Node<'_, '_>| {
        let attribute = |name| n.attribute(name).unwrap_or_default();
        let args = n.children().filter(|c| c.has_tag_name("arg")).map(|a| {
            let attribute = |name| a.attribute(name).unwrap_or_default();
            format!(
                "{} {}:{}",
                attribute("direction"),
                attribute("name"),
                attribute("type")
            )
        });
        format!(
            "{} {} {} {} {} {:?}",
            n.tag_name().name(),
            attribute("name"),
            attribute("type"),
            attribute("access"),
            annotation(&n),
            args.collect::<Vec<_>>(),
        )
    };
    root.children()
        .filter(|n| n.is_element() && !n.has_tag_name("annotation"))
        .map(member)
        .collect()
}

#[test]
fn the_daemon_introspects_to_the_documented_xml() {
    let daemon = Daemon::start(&[]);
    daemon.export("d0", 4 * MIB, &[], &[]);
    let copy = daemon.path("copy.qcow2");
    daemon.ctl(&["node", "add", "n0", "driver=null-co", "size=4M"]);
    let slow = ["--speed", "1", "--detach", "job-id=j0"];
    daemon.ctl(&[&["backup", "n0", copy.to_str().unwrap()][..], &slow].concat());
    daemon.ctl(&["bitmap", "add", "d0", "b0"]);
    let socket = daemon.path("e0");
    let nbd = ["--type", "nbd", "--socket", socket.to_str().unwrap()];
    daemon.ctl(&[&["export", "add", "e0", "--node", "n0"][..], &nbd].concat());
    for (interface, xml) in vdisk_dbus::INTERFACES {
        let path = match interface {
            "org.vdisk1.Manager" => "/org/vdisk1",
            "org.vdisk1.Job" => "/org/vdisk1/job/j0",
            "org.vdisk1.Bitmap" => "/org/vdisk1/bitmap/d0/b0",
            "org.vdisk1.Node" => "/org/vdisk1/node/d0",
            "org.vdisk1.IoThread" => "/org/vdisk1/iothread/io0",
            "org.vdisk1.Export.Nbd" => "/org/vdisk1/export/e0",
            _ => "/org/vdisk1/export/d0",
        };
        let said = busctl(
            &daemon,
            &["introspect", "--xml-interface", "org.vdisk1", path],
        )
        .unwrap();
        assert_eq!(
            members(&said, interface),
            members(xml, interface),
            "{interface}"
        );
    }
}

#[test]
fn every_member_of_the_xml_is_documented() {
    let all = vdisk_dbus::INTERFACES.iter();
    for (interface, xml) in all.chain(&vdisk_dbus::LIBVIRT_INTERFACES) {
        assert!(xml.contains(&format!("    {interface}:\n")), "{interface}");
        for method in xml.split("<method name=\"").skip(1) {
            let name = method.split('"').next().unwrap();
            assert!(
                xml.contains(&format!("      {name}:\n")),
                "{interface}.{name}"
            );
        }
        let options = roxmltree::ParsingOptions {
            allow_dtd: true,
            ..Default::default()
        };
        let doc = roxmltree::Document::parse_with_options(xml, options).unwrap();
        let args = doc.descendants().filter(|n| n.has_tag_name("arg"));
        for name in args.filter_map(|n| n.attribute("name").map(str::to_owned)) {
            assert!(
                xml.contains(&format!("@{name}:")),
                "{interface}: argument {name}"
            );
        }
    }
}

#[test]
fn busctl_can_do_everything() {
    let daemon = Daemon::start(&[]);
    let call = |path: &str, interface: &str, rest: &[&str]| {
        let mut args = vec!["call", "org.vdisk1", path, interface];
        args.extend(rest);
        busctl(&daemon, &args)
    };
    let image = daemon.image("a.img", MIB);
    let (image, socket) = (image.to_str().unwrap(), daemon.path("s"));
    let manager = "org.vdisk1.Manager";
    let options = [
        "AddNode",
        "a{sv}",
        "4",
        "driver",
        "s",
        "raw",
        "node-name",
        "s",
        "n-1",
        "file.driver",
        "s",
        "file",
        "file.filename",
        "s",
        image,
    ];
    assert_eq!(
        call("/org/vdisk1", manager, &options).unwrap().trim(),
        "o \"/org/vdisk1/node/n_2d1\""
    );
    let socket = socket.to_str().unwrap();
    let options = [
        "AddExport",
        "a{sv}",
        "5",
        "type",
        "s",
        "vhost-user-blk",
        "id",
        "s",
        "e",
        "node-name",
        "s",
        "n-1",
        "writable",
        "b",
        "true",
        "addr.path",
        "s",
        socket,
    ];
    call("/org/vdisk1", manager, &options).unwrap();
    let node = "/org/vdisk1/node/n_2d1";
    call(
        node,
        "org.vdisk1.Node",
        &["Resize", "ta{sv}", "2097152", "0"],
    )
    .unwrap();
    let size = [
        "get-property",
        "org.vdisk1",
        node,
        "org.vdisk1.Node",
        "Size",
    ];
    assert_eq!(busctl(&daemon, &size).unwrap().trim(), "t 2097152");
    let stats = call(
        "/org/vdisk1/export/e",
        "org.vdisk1.Export",
        &["GetStatistics", "a{sv}", "0"],
    );
    assert!(stats.unwrap().contains("\"interrupts\" t 0"));
    let threads = [
        "AddIoThread",
        "sa{sv}",
        "fast",
        "1",
        "poll-max-ns",
        "t",
        "0",
    ];
    call("/org/vdisk1", manager, &threads).unwrap();
    let e = call(node, "org.vdisk1.Node", &["Remove", "a{sv}", "0"]).unwrap_err();
    assert!(e.contains("used by export 'e'"), "{e}");
    call(
        "/org/vdisk1/export/e",
        "org.vdisk1.Export",
        &["Remove", "a{sv}", "0"],
    )
    .unwrap();
    call(node, "org.vdisk1.Node", &["Remove", "a{sv}", "0"]).unwrap();
    let tree = busctl(&daemon, &["--list", "tree", "org.vdisk1"]).unwrap();
    assert!(
        !tree.contains("node/") && !tree.contains("export/"),
        "{tree}"
    );
    assert!(!std::path::Path::new(socket).exists());
}

#[test]
fn changes_are_signalled() {
    let daemon = Daemon::start(&[]);
    let log = daemon.path("signals");
    let out = std::fs::File::create(&log).unwrap();
    let mut monitor = Command::new("busctl")
        .arg(format!("--address={}", daemon.bus_address()))
        .args(["monitor", "org.vdisk1"])
        .stdout(out)
        .spawn()
        .unwrap();
    let seen = || std::fs::read_to_string(&log).unwrap_or_default();
    // The monitor is there once it shows a call.
    wait_for("the monitor", || {
        daemon.ctl(&["info"]);
        seen().contains("IoEngine").then_some(())
    });
    let (_, socket) = daemon.export("d0", MIB, &[], &[]);
    daemon.ctl(&["node", "resize", "d0", "2M"]);
    let front_end = std::os::unix::net::UnixStream::connect(socket).unwrap();
    wait_for("the signals", || {
        let text = seen();
        let all = [
            "InterfacesAdded",
            "\"Size\"",
            "UINT64 2097152",
            "\"Parents\"",
            "\"Clients\"",
        ];
        all.iter().all(|w| text.contains(w)).then_some(())
    });
    drop(front_end);
    let _ = monitor.kill();
    let _ = monitor.wait();
}

/// Mistakes: the command, the exit code, and what the message must contain.
#[test]
fn every_mistake_is_named_and_changes_nothing() {
    let daemon = Daemon::start(&[]);
    let at = |name: &str| daemon.path(name).display().to_string();
    let file = |name: &str| format!("filename={}", at(name));
    daemon.image("good.img", MIB);
    daemon.image("odd.img", MIB + 100);
    std::fs::create_dir(daemon.path("dir")).unwrap();
    std::fs::write(daemon.path("plain"), "x").unwrap();
    daemon.ctl(&["node", "add", "good", "driver=file", &file("good.img")]);
    daemon.ctl(&["node", "add", "odd", "driver=file", &file("odd.img")]);
    daemon.ctl(&["node", "add", "ro", "driver=null-co", "read-only=on"]);
    let used = at("used.sock");
    daemon.ctl(&[
        "export",
        "add",
        "used",
        "--node",
        "good",
        "--socket",
        &used,
        "--writable",
    ]);
    let before = daemon.ctl(&["--json", "tree"]);

    let (missing, dir, plain) = (file("missing.img"), file("dir"), at("plain"));
    let (good, new) = (file("good.img"), at("new.sock"));
    let (long, nowhere) = (at(&"x".repeat(120)), at("no/such/dir/s"));
    let null = "filename=/dev/null".to_owned();
    let cases: Vec<(Vec<&str>, i32, Vec<&str>)> = vec![
        (
            vec!["node", "add", "x", "driver=file", &missing],
            3,
            vec!["'x'", "missing.img"],
        ),
        (
            vec!["node", "add", "x", "driver=file", &dir],
            2,
            vec!["'x'", "a directory"],
        ),
        (
            vec!["node", "add", "x", "driver=host_device", &good],
            2,
            vec!["not a block device", "'file'"],
        ),
        (
            vec!["node", "add", "x", "driver=file", &null],
            2,
            vec!["not a regular file"],
        ),
        (
            vec!["node", "add", "x", "driver=qcow9"],
            2,
            vec!["'x'", "qcow9", "raw"],
        ),
        (
            vec!["node", "add", "x", "driver=file", &good, "cash.direct=on"],
            2,
            vec!["'cash'", "cache"],
        ),
        (
            vec!["node", "add", "x", "driver=file", &good],
            4,
            vec!["'x'", "good.img", "locked"],
        ),
        (
            vec!["node", "add", "good", "driver=null-co"],
            4,
            vec!["'good'", "already"],
        ),
        (
            vec!["node", "add", "x", "driver=raw", "file=nobody"],
            3,
            vec!["'x'", "'nobody'"],
        ),
        (
            vec!["node", "add", "x", "driver=raw", "file=odd", "offset=9M"],
            2,
            vec!["offset", "odd"],
        ),
        (
            vec!["node", "add", "9x", "driver=null-co"],
            2,
            vec!["'9x'", "letter"],
        ),
        (
            vec!["node", "add", "x", "driver=null-co", "size=-1"],
            2,
            vec!["size", "-1"],
        ),
        (
            vec!["node", "add", "x", "nonsense"],
            2,
            vec!["'nonsense'", "KEY=VALUE"],
        ),
        (vec!["node", "remove", "good"], 4, vec!["'good'", "'used'"]),
        (vec!["node", "remove", "nobody"], 3, vec!["'nobody'"]),
        (
            vec!["node", "resize", "good", "512k"],
            2,
            vec!["'good'", "shrink"],
        ),
        (
            vec!["node", "resize", "good", "+100"],
            2,
            vec!["block size 512"],
        ),
        (vec!["node", "resize", "good", "big"], 2, vec!["'big'"]),
        (
            vec!["node", "resize", "ro", "2G"],
            2,
            vec!["'ro'", "read-only"],
        ),
        (
            vec!["export", "add", "e", "--node", "nobody", "--socket", &new],
            3,
            vec!["'e'", "'nobody'"],
        ),
        (
            vec!["export", "add", "e", "--node", "good"],
            2,
            vec!["'e'", "addr"],
        ),
        (
            vec![
                "export",
                "add",
                "e",
                "--node",
                "good",
                "--socket",
                &new,
                "--writable",
            ],
            4,
            vec!["'e'", "'used'", "'good'", "write"],
        ),
        (
            vec![
                "export",
                "add",
                "e",
                "--node",
                "ro",
                "--socket",
                &new,
                "--writable",
            ],
            2,
            vec!["'ro'", "read-only"],
        ),
        (
            vec!["export", "add", "e", "--node", "odd", "--socket", &new],
            2,
            vec!["1048676", "1049088"],
        ),
        (
            vec![
                "export", "add", "e", "--node", "good", "--socket", &new, "--queues", "65",
            ],
            2,
            vec!["num-queues", "65", "64"],
        ),
        (
            vec!["export", "add", "e", "--node", "good", "--socket", &long],
            2,
            vec!["107"],
        ),
        (
            vec!["export", "add", "e", "--node", "good", "--socket", &nowhere],
            3,
            vec!["'e'", "no/such/dir"],
        ),
        (
            vec!["export", "add", "e", "--node", "good", "--socket", &plain],
            4,
            vec!["not a socket"],
        ),
        (
            vec!["export", "add", "e", "--node", "good", "--socket", &used],
            4,
            vec!["in use by another"],
        ),
        (
            vec!["export", "add", "used", "--node", "ro", "--socket", &new],
            4,
            vec!["'used'", "already"],
        ),
        (
            vec![
                "export",
                "add",
                "e",
                "--node",
                "good",
                "--socket",
                &new,
                "--iothread",
                "io9",
            ],
            3,
            vec!["'io9'"],
        ),
        (
            vec![
                "export",
                "add",
                "e",
                "--node",
                "good",
                "--socket",
                &new,
                "socket-group=nobody-there",
            ],
            3,
            vec!["nobody-there"],
        ),
        (
            vec![
                "export",
                "add",
                "e",
                "--node",
                "good",
                "--socket",
                &new,
                "logical-block-size=8192",
            ],
            2,
            vec!["8192", "4096"],
        ),
        (vec!["export", "remove", "nobody"], 3, vec!["'nobody'"]),
        (
            vec!["iothread", "remove", "io0"],
            4,
            vec!["'io0'", "'used'"],
        ),
        (vec!["iothread", "remove", "io9"], 3, vec!["'io9'"]),
        (vec!["iothread", "add", "io0"], 4, vec!["'io0'", "already"]),
        (vec!["iothread", "add", "io1", "cpus=900"], 2, vec!["900"]),
        (
            vec!["iothread", "set", "io0", "poll-max-ns=fast"],
            2,
            vec!["poll-max-ns", "fast"],
        ),
        (vec!["stats", "nobody"], 3, vec!["'nobody'"]),
    ];
    for (args, code, parts) in cases {
        let (got, message) = daemon.ctl_error(&args);
        assert_eq!(got, code, "{args:?}: {message}");
        assert_eq!(message.trim().lines().count(), 1, "{message}");
        for part in parts {
            assert!(message.contains(part), "{args:?}: no {part:?} in {message}");
        }
    }
    assert_eq!(daemon.ctl(&["--json", "tree"]), before);
    assert!(!daemon.path("new.sock").exists());
}

#[test]
fn wrong_types_are_errors_of_the_right_name() {
    let daemon = Daemon::start(&[]);
    let add = |rest: &[&str]| {
        let mut args = vec![
            "--json=short",
            "call",
            "org.vdisk1",
            "/org/vdisk1",
            "org.vdisk1.Manager",
            "AddNode",
            "a{sv}",
        ];
        args.extend(rest);
        busctl(&daemon, &args).unwrap_err()
    };
    let e = add(&["2", "driver", "s", "null-co", "node-name", "u", "7"]);
    assert!(e.contains("node-name") && e.contains('7'), "{e}");
    let e = add(&[
        "3",
        "driver",
        "s",
        "null-co",
        "node-name",
        "s",
        "n",
        "size",
        "(u)",
        "7",
    ]);
    assert!(e.contains("'size'"), "{e}");
    // The name of the error, as a program in another language sees it.
    let script = "
import dbus, sys
bus = dbus.bus.BusConnection(sys.argv[1])
manager = dbus.Interface(bus.get_object('org.vdisk1', '/org/vdisk1'), 'org.vdisk1.Manager')
for options in ({'driver': 'null-co'}, {'driver': 'x', 'node-name': 'n'},
                {'driver': 'null-co', 'node-name': 'n', 'cache': {'direct': 3}}):
    try:
        manager.AddNode(dbus.Dictionary(options, signature='sv'))
        print('accepted')
    except dbus.DBusException as e:
        print(e.get_dbus_name())
path = manager.AddNode(dbus.Dictionary({'driver': 'null-co', 'node-name': 'n'}, signature='sv'))
node = dbus.Interface(bus.get_object('org.vdisk1', path), 'org.freedesktop.DBus.Properties')
print(node.Get('org.vdisk1.Node', 'Size'))
";
    let out = Command::new("/usr/bin/python3")
        .args(["-c", script, daemon.bus_address()])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    let expected = "org.vdisk1.Error.InvalidArgument\norg.vdisk1.Error.NotSupported\n\
                    org.vdisk1.Error.InvalidArgument\n1073741824\n";
    assert_eq!(text, expected, "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn images_are_locked_against_qemu_and_the_other_way_round() {
    let daemon = Daemon::start(&[]);
    let image = daemon.image("d.img", MIB);
    let path = image.to_str().unwrap();
    let filename = format!("filename={path}");
    let qemu_io = |args: &[&str]| {
        let out = Command::new("qemu-io")
            .args(args)
            .output()
            .expect("run 'make setup'");
        (
            out.status.success(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    daemon.ctl(&["node", "add", "d", "driver=file", &filename]);
    let (ok, message) = qemu_io(&["-f", "raw", "-c", "write 0 512", path]);
    assert!(!ok && message.contains("lock"), "{message}");
    assert!(!qemu_io(&["-r", "-f", "raw", "-c", "read 0 512", path]).0);
    daemon.ctl(&["node", "remove", "d"]);
    // Two readers get along.
    daemon.ctl(&["node", "add", "d", "driver=file", &filename, "read-only=on"]);
    assert!(qemu_io(&["-r", "-f", "raw", "-c", "read 0 512", path]).0);
    assert!(!qemu_io(&["-f", "raw", "-c", "write 0 512", path]).0);
    daemon.ctl(&["node", "remove", "d"]);
    // QEMU has it open for writing.
    let blockdev = format!("driver=file,node-name=d,{filename}");
    let monitor = daemon.path("monitor");
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "q35",
            "-S",
            "-nodefaults",
            "-display",
            "none",
            "-accel",
            "tcg",
            "-qmp",
            &format!("unix:{},server=on,wait=off", monitor.display()),
        ])
        .args(["-blockdev", &blockdev, "-device", "virtio-blk-pci,drive=d"])
        .spawn()
        .unwrap();
    // Its monitor answers when everything is open. (Trying the lock could take it from QEMU.)
    let _monitor = Qmp::connect(&monitor);
    assert!(!qemu_io(&["-f", "raw", "-c", "write 0 512", path]).0);
    let (code, message) = daemon.ctl_error(&["node", "add", "d", "driver=file", &filename]);
    assert_eq!(code, 4, "{message}");
    assert!(
        message.contains("locked") && message.contains("d.img"),
        "{message}"
    );
    let (code, _) =
        daemon.ctl_error(&["node", "add", "d", "driver=file", &filename, "read-only=on"]);
    assert_eq!(code, 4);
    daemon.ctl(&[
        "node",
        "add",
        "d",
        "driver=file",
        &filename,
        "read-only=on",
        "force-share=on",
    ]);
    let _ = qemu.kill();
    let _ = qemu.wait();
}

#[test]
fn sigterm_ends_the_daemon_in_order() {
    let mut daemon = Daemon::start(&["--io-threads", "2"]);
    let (_, socket) = daemon.export("d0", MIB, &[], &[]);
    let front_end = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    assert_eq!(daemon.terminate(), Some(0));
    assert!(!socket.exists());
    drop(front_end);
    daemon.start_again();
    assert_eq!(daemon.ctl_json(&["node", "list"]), json!([]));
}

#[test]
fn exports_begin_on_different_threads() {
    let daemon = Daemon::start(&["--io-threads", "2"]);
    for name in ["a", "b", "c", "d"] {
        daemon.export(name, MIB, &[], &["--queues", "3"]);
    }
    let threads = daemon.ctl_json(&["iothread", "list"]);
    for thread in threads.as_array().unwrap() {
        let queues = thread["Queues"].as_array().unwrap();
        let first = queues.iter().filter(|q| q[1] == 0).count();
        assert_eq!((queues.len(), first), (6, 2), "{threads}");
    }
}

#[test]
fn an_idle_export_uses_no_cpu_and_little_memory() {
    let daemon = Daemon::start(&[]);
    let (_, socket) = daemon.export("d0", MIB, &[], &[]);
    let mut f = vdisk_qemu_tests::frontend::Frontend::start(&socket);
    assert_eq!(f.simple(0, 0, 512), 0);
    let turns = || daemon.ctl_json(&["stats"])["iothreads"]["io0"]["turns"].clone();
    // Once it has gone to sleep it makes no turn more.
    let mut last = turns();
    wait_for("the I/O thread to sleep", || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        let now = turns();
        let asleep = now == last;
        last = now;
        asleep.then_some(())
    });
    let resident = daemon.resident_kib();
    assert!(
        cfg!(debug_assertions) || resident < 15 * 1024,
        "{resident} KiB"
    );
}

#[test]
fn an_engine_can_be_chosen_and_is_told() {
    for engine in ["uring", "aio", "threads"] {
        let daemon = Daemon::start(&["--io-engine", engine]);
        assert_eq!(daemon.ctl_json(&["info"])["IoEngine"], engine);
    }
    let out = Command::new(vdisk_qemu_tests::program("vdiskd"))
        .args(["--io-engine", "warp"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(
        message.contains("warp") && message.contains("threads"),
        "{message}"
    );
}

#[test]
fn completion_and_man_pages_come_from_the_program() {
    let run = |args: &[&str]| {
        let out = Command::new(vdiskctl_binary()).args(args).output().unwrap();
        assert!(out.status.success());
        String::from_utf8_lossy(&out.stdout).into_owned()
    };
    assert!(run(&["completion", "bash"]).contains("iothread"));
    let man = run(&["man"]);
    for word in [
        "VDISKCTL NODE RESIZE",
        "VDISKCTL EXPORT ADD",
        "cache.direct",
    ] {
        assert!(man.contains(word), "{word}");
    }
    let (code, message) = {
        let out = Command::new(vdiskctl_binary())
            .args(["--bus-address", "unix:path=/nonexistent", "tree"])
            .output()
            .unwrap();
        (
            out.status.code(),
            String::from_utf8_lossy(&out.stderr).into_owned(),
        )
    };
    assert_eq!(code, Some(6), "{message}");
}

#[test]
fn a_listening_socket_can_be_passed() {
    let daemon = Daemon::start(&[]);
    daemon.ctl(&["node", "add", "n", "driver=null-co"]);
    let socket = daemon.path("passed");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    vdisk_qemu_tests::pass_listener(daemon.bus_address(), "e", "n", listener.into());
    assert_eq!(daemon.ctl_json(&["export", "show", "e"])["Socket"], "");
    let mut f = vdisk_qemu_tests::frontend::Frontend::start(&socket);
    assert_eq!(f.simple(0, 0, 512), 0);
}
