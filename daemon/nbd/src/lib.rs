//! The NBD protocol (doc/proto.md of the NetworkBlockDevice project), fixed newstyle.
//!
//! * [`wire`]: numbers and layouts;
//! * [`client`]: the first words of a client, until requests can be sent;
//! * [`server`]: those of a server;
//! * [`network`]: the thread on which connections live. I/O threads never wait for a socket.

pub mod client;
pub mod network;
pub mod server;
pub mod wire;

/// The longest name of an export, in bytes ("Values", string lengths).
pub const MAX_NAME: usize = 4096;

/// The most data in one request, in bytes: what clients may take for granted if nothing else is said ("Block size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;

/// The context that tells where there is data.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// A context of ours (the protocol leaves namespaces to whoever has a use for them): who has asked for it may say with
/// [`wire::command::FINISHED`] that what it writes is, or is not, all that is to be written.
pub const FINISHED: &str = "vdiskd:finished";

/// The other side said something that it may not say, or nothing at all.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("{0}")]
    Io(#[from] std::io::Error),
    #[error("{0}")]
    Protocol(String),
    /// The server has said no.
    #[error("the server refuses: {0}")]
    Refused(String),
}

impl HandshakeError {
    fn protocol(what: impl Into<String>) -> HandshakeError {
        HandshakeError::Protocol(what.into())
    }
}
