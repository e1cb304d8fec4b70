//! Taking turns with the other tasks of a thread.

use std::future::poll_fn;
use std::task::Poll;

/// Lets the others on the thread have a turn.
pub async fn give_way() {
    let mut waited = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
