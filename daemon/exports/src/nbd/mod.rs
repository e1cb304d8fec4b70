//! Exports over NBD: programs on this host (and, through whatever carries bytes, on others) read and write a node.
//!
//! * `export`: the socket, and the clients that are connected;
//! * `connection`: one client, on the thread of connections: takes requests, and sends replies in the order in which they are done;
//! * `lane`: a client's requests on their I/O thread.

mod connection;
mod export;
mod lane;

pub use export::{Nbd, NbdSetup};
