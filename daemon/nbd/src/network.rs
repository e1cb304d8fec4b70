//! The thread on which connections live.

use std::sync::OnceLock;

use tokio::runtime::Handle;

static THREAD: OnceLock<Handle> = OnceLock::new();

/// The executor of the thread, which is started when it is needed for the first time.
///
/// # Errors
/// If no thread can be started.
pub fn handle() -> std::io::Result<Handle> {
    if let Some(handle) = THREAD.get() {
        return Ok(handle.clone());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let handle = runtime.handle().clone();
    // Two who come first at once make two, and both use one: the other has nothing to do, and ends.
    if THREAD.set(handle).is_ok() {
        std::thread::Builder::new()
            .name("nbd".into())
            .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    }
    THREAD
        .get()
        .cloned()
        .ok_or_else(|| std::io::Error::other("there is no thread for connections"))
}
