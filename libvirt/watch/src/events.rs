//! libvirt's events. Of most it only matters that there was one: whoever hears of it looks at everything anew.
//!
//! Crate virt has no safe way to register for events of domains. What libvirt calls here runs on the thread of its event loop, touches
//! nothing that libvirt gives it, and sends one word.

use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

use tokio::sync::mpsc::UnboundedSender;
use virt::connect::Connect;
use virt::sys;

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A domain, or one of its disks, came, went or changed.
    Change,
    /// libvirt's daemon has gone.
    Closed,
}

static LISTENER: OnceLock<UnboundedSender<Heard>> = OnceLock::new();

fn tell(heard: Heard) {
    if let Some(listener) = LISTENER.get() {
        let _ = listener.send(heard);
    }
}

extern "C" fn lifecycle(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    _event: c_int,
    _detail: c_int,
    _: *mut c_void,
) -> c_int {
    tell(Heard::Change);
    0
}

extern "C" fn device(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    _alias: *const c_char,
    _: *mut c_void,
) {
    tell(Heard::Change);
}

extern "C" fn metadata(
    _: sys::virConnectPtr,
    _: sys::virDomainPtr,
    _kind: c_int,
    _namespace: *const c_char,
    _: *mut c_void,
) {
    tell(Heard::Change);
}

extern "C" fn closed(_: sys::virConnectPtr, _reason: c_int, _: *mut c_void) {
    tell(Heard::Closed);
}

/// Has libvirt's event loop run, on a thread of its own, and `listener` told. Once, and before the first connection.
pub fn start(listener: UnboundedSender<Heard>) -> Result<(), String> {
    virt::event::event_register_default_impl().map_err(|e| e.message().to_owned())?;
    LISTENER
        .set(listener)
        .map_err(|_| "there is a listener already".to_owned())?;
    let run = || {
        while virt::event::event_run_default_impl().is_ok() {}
        tracing::error!("libvirt's event loop has ended: nothing is heard any more");
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .name("libvirt".into())
        .spawn(run)
        .map_err(|e| e.to_string())?;
    Ok(())
}

/// Registers for everything that matters on a connection.
pub fn register(connection: &Connect) -> Result<(), String> {
    type Generic = extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
    type Device = extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *const c_char, *mut c_void);
    // SAFETY: libvirt calls a callback with the arguments that belong to the event that it was registered for
    // (virConnectDomainEventRegisterAny: "cast to VIR_DOMAIN_EVENT_CALLBACK"); each is registered below for the event whose
    // signature it has.
    let callbacks: [(u32, Generic); 4] = unsafe {
        [
            (
                sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE,
                std::mem::transmute::<
                    extern "C" fn(
                        sys::virConnectPtr,
                        sys::virDomainPtr,
                        c_int,
                        c_int,
                        *mut c_void,
                    ) -> c_int,
                    Generic,
                >(lifecycle),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_DEVICE_ADDED,
                std::mem::transmute::<Device, Generic>(device),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_DEVICE_REMOVED,
                std::mem::transmute::<Device, Generic>(device),
            ),
            (
                sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE,
                std::mem::transmute::<
                    extern "C" fn(
                        sys::virConnectPtr,
                        sys::virDomainPtr,
                        c_int,
                        *const c_char,
                        *mut c_void,
                    ),
                    Generic,
                >(metadata),
            ),
        ]
    };
    let failed = || virt::error::Error::last_error().message().to_owned();
    for (event, callback) in callbacks {
        // SAFETY: the connection is open; no domain is named, no memory is handed over, and the callback lives as long as the program.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                connection.as_ptr(),
                std::ptr::null_mut(),
                event as c_int,
                Some(callback),
                std::ptr::null_mut(),
                None,
            )
        };
        if id < 0 {
            return Err(failed());
        }
    }
    // SAFETY: as above.
    let registered = unsafe {
        sys::virConnectRegisterCloseCallback(
            connection.as_ptr(),
            Some(closed),
            std::ptr::null_mut(),
            None,
        )
    };
    match registered {
        0 => Ok(()),
        _ => Err(failed()),
    }
}
