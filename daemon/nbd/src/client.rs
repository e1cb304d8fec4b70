//! The first words of a client.

use std::io::{Read, Write};

use crate::wire::{self, Reader, handshake, info, option, option_reply};
use crate::{BASE_ALLOCATION, FINISHED, HandshakeError, MAX_NAME, MAX_PAYLOAD};

/// Longest reply to an option, in bytes.
const MAX_REPLY: u32 = 64 << 10;

/// The largest block that is taken for efficient, in bytes: buffers and bitmaps are made after it.
const MAX_PREFERRED: u32 = 2 << 20;

/// Most replies to one option.
const MAX_REPLIES: u32 = 1000;

/// What a server offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Bytes.
    pub size: u64,
    /// Of [`wire::transmission`].
    pub flags: u16,
    /// Offsets and lengths are to be multiples of this, a power of two.
    pub min_block: u32,
    /// What whole multiples of are efficient, in bytes, a power of two.
    pub preferred_block: u32,
    /// The most data in one request, in bytes.
    pub max_payload: u32,
    /// Replies are structured.
    pub structured: bool,
    /// The number of the context `base:allocation`, if it can be asked for.
    pub allocation: Option<u32>,
    /// That of [`FINISHED`], if the server knows it.
    pub finished: Option<u32>,
}

/// Agrees with a server on the use of an export.
///
/// # Errors
/// If the server has no such export, or does not speak NBD.
pub fn greet(stream: &mut (impl Read + Write), export: &str) -> Result<Offered, HandshakeError> {
    if export.len() > MAX_NAME {
        return Err(HandshakeError::protocol(format!(
            "a name of {} bytes: at most {MAX_NAME} are possible",
            export.len()
        )));
    }
    let mut hello = [0; 18];
    stream.read_exact(&mut hello)?;
    let mut r = Reader(&hello);
    if r.u64() != Some(wire::SERVER_MAGIC) || r.u64() != Some(wire::OPTION_MAGIC) {
        return Err(HandshakeError::protocol(
            "who answers there speaks no (newstyle) NBD",
        ));
    }
    let flags = r.u16().unwrap_or(0);
    if flags & handshake::FIXED_NEWSTYLE == 0 {
        return Err(HandshakeError::protocol(
            "the server does not know options (fixed newstyle)",
        ));
    }
    let ours = flags & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
    stream.write_all(&u32::from(ours).to_be_bytes())?;

    let mut offered = Offered {
        size: 0,
        flags: 0,
        min_block: 1,
        preferred_block: 4096,
        max_payload: MAX_PAYLOAD,
        structured: false,
        allocation: None,
        finished: None,
    };
    offered.structured = ask(stream, option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_ok();
    if offered.structured {
        ask_for_contexts(stream, export, &mut offered)?;
    }
    let mut data = Vec::new();
    wire::put_string(&mut data, export);
    data.extend(1u16.to_be_bytes());
    data.extend(info::BLOCK_SIZE.to_be_bytes());
    let mut seen = false;
    let answer = ask(stream, option::GO, &data, |kind, data| {
        if kind == option_reply::INFO {
            seen |= read_info(&mut offered, data)?;
        }
        Ok(())
    })?;
    match answer {
        Ok(()) if seen => check(offered),
        Ok(()) => Err(HandshakeError::protocol("the server did not tell the size")),
        Err(No { kind, .. }) if kind == option_reply::UNSUPPORTED => {
            let zeroes = flags & handshake::NO_ZEROES == 0;
            name_export(stream, export, zeroes, offered)
        }
        Err(no) => Err(HandshakeError::Refused(no.to_string())),
    }
}

/// The way of servers that know nothing else: they end the connection if they do not have the export.
fn name_export(
    stream: &mut (impl Read + Write),
    export: &str,
    zeroes: bool,
    mut offered: Offered,
) -> Result<Offered, HandshakeError> {
    stream.write_all(&wire::option_request(
        option::EXPORT_NAME,
        export.as_bytes(),
    ))?;
    let mut reply = [0; 10 + 124];
    let len = if zeroes { reply.len() } else { 10 };
    stream.read_exact(&mut reply[..len])?;
    let mut r = Reader(&reply);
    offered.size = r.u64().unwrap_or(0);
    offered.flags = r.u16().unwrap_or(0);
    check(offered)
}

fn ask_for_contexts(
    stream: &mut (impl Read + Write),
    export: &str,
    offered: &mut Offered,
) -> Result<(), HandshakeError> {
    let mut data = Vec::new();
    wire::put_string(&mut data, export);
    data.extend(2u32.to_be_bytes());
    wire::put_string(&mut data, BASE_ALLOCATION);
    wire::put_string(&mut data, FINISHED);
    let (mut allocation, mut finished) = (None, None);
    let answer = ask(stream, option::SET_META_CONTEXT, &data, |kind, data| {
        if kind == option_reply::META_CONTEXT {
            let mut r = Reader(data);
            let number = r.u32();
            if r.0 == BASE_ALLOCATION.as_bytes() {
                allocation = number;
            } else if r.0 == FINISHED.as_bytes() {
                finished = number;
            }
        }
        Ok(())
    })?;
    // A server without them can be used all the same.
    if answer.is_ok() {
        (offered.allocation, offered.finished) = (allocation, finished);
    }
    Ok(())
}

/// True for the size.
fn read_info(offered: &mut Offered, data: &[u8]) -> Result<bool, HandshakeError> {
    let short = || HandshakeError::protocol("the server's information is too short");
    let mut r = Reader(data);
    match r.u16().ok_or_else(short)? {
        info::EXPORT => {
            offered.size = r.u64().ok_or_else(short)?;
            offered.flags = r.u16().ok_or_else(short)?;
            return Ok(true);
        }
        info::BLOCK_SIZE => {
            offered.min_block = r.u32().ok_or_else(short)?;
            offered.preferred_block = r.u32().ok_or_else(short)?;
            offered.max_payload = r.u32().ok_or_else(short)?;
        }
        _ => {}
    }
    Ok(false)
}

fn check(mut offered: Offered) -> Result<Offered, HandshakeError> {
    let (min, preferred) = (offered.min_block, offered.preferred_block);
    let sane = min.is_power_of_two()
        && min <= 64 << 10
        && preferred.is_power_of_two()
        && preferred >= min
        && offered.max_payload >= preferred.min(min.max(512));
    if !sane {
        return Err(HandshakeError::protocol(format!(
            "the server's block sizes are {min}, {preferred} and {}: powers of two are needed",
            offered.max_payload
        )));
    }
    if !offered.size.is_multiple_of(min.into()) || offered.size > i64::MAX as u64 {
        return Err(HandshakeError::protocol(format!(
            "the server's export has {} bytes: whole blocks of {min} are needed",
            offered.size
        )));
    }
    offered.preferred_block = preferred.min(MAX_PREFERRED);
    offered.max_payload = offered.max_payload.min(MAX_PAYLOAD) & !(min - 1);
    if offered.flags & wire::transmission::HAS_FLAGS == 0 {
        offered.flags = 0;
    }
    Ok(offered)
}

/// The server's error reply to an option.
struct No {
    kind: u32,
    message: String,
}

impl std::fmt::Display for No {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            option_reply::UNSUPPORTED => "the option is not known",
            option_reply::INVALID => "the option is invalid",
            option_reply::UNKNOWN => "there is no such export",
            option_reply::TOO_BIG => "the option is too long",
            _ => "error",
        };
        match self.message.is_empty() {
            true => write!(f, "{kind} ({:#x})", self.kind),
            false => write!(f, "{kind}: {}", self.message),
        }
    }
}

/// Sends an option and reads its replies up to the last one.
fn ask(
    stream: &mut (impl Read + Write),
    option: u32,
    data: &[u8],
    mut reply: impl FnMut(u32, &[u8]) -> Result<(), HandshakeError>,
) -> Result<Result<(), No>, HandshakeError> {
    stream.write_all(&wire::option_request(option, data))?;
    for _ in 0..MAX_REPLIES {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        let mut r = Reader(&header);
        let (magic, of) = (r.u64(), r.u32());
        let (Some(kind), Some(len)) = (r.u32(), r.u32()) else {
            break;
        };
        if magic != Some(wire::OPTION_REPLY_MAGIC) || of != Some(option) || len > MAX_REPLY {
            return Err(HandshakeError::protocol(
                "the server's reply to an option is malformed",
            ));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        if kind == option_reply::ACK {
            return Ok(Ok(()));
        }
        if kind & option_reply::ERROR != 0 {
            let message = String::from_utf8_lossy(&data);
            let message = message.chars().filter(|c| !c.is_control()).take(200);
            return Ok(Err(No {
                kind,
                message: message.collect(),
            }));
        }
        reply(kind, &data)?;
    }
    Err(HandshakeError::protocol(
        "the server's reply to an option has no end",
    ))
}
