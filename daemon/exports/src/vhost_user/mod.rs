//! Exports over vhost-user (the vhost-user specification in QEMU's documentation): a front-end, most
//! often QEMU, shares guest memory and virtqueues through a Unix socket.
//!
//! * [`message`]: the wire format;
//! * `channel`: the socket, with file descriptors;
//! * [`state`]: what was negotiated, as one serialisable value;
//! * `connection`: one front-end, from connect to close;
//! * `parcel`: a connection in one file descriptor, for the next process;
//! * `export`: the whole.

pub mod message;
pub mod state;

mod channel;
mod connection;
mod export;
mod pace;
mod parcel;

pub use export::VhostUserBlk;
pub use parcel::{unwrap, wrap};
