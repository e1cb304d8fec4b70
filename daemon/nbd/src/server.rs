//! The first words of a server that has one export.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::wire::{self, Reader, handshake, info, option, option_reply};
use crate::{BASE_ALLOCATION, FINISHED, HandshakeError, MAX_NAME, MAX_PAYLOAD};

/// Longest option, in bytes: a name, and some contexts.
const MAX_OPTION: u32 = 64 << 10;

/// Most options of a client.
const MAX_OPTIONS: u32 = 1000;

/// The number of the context `base:allocation` on every connection.
pub const ALLOCATION_CONTEXT: u32 = 1;

/// That of [`FINISHED`].
pub const FINISHED_CONTEXT: u32 = 2;

const CONTEXTS: [(&str, u32); 2] = [
    (BASE_ALLOCATION, ALLOCATION_CONTEXT),
    (FINISHED, FINISHED_CONTEXT),
];

/// What is offered.
#[derive(Clone, Debug)]
pub struct Offer {
    /// The empty name is this one, too.
    pub name: String,
    pub description: String,
    /// Bytes.
    pub size: u64,
    /// Of [`wire::transmission`].
    pub flags: u16,
    /// Bytes, a power of two.
    pub min_block: u32,
    pub preferred_block: u32,
}

/// What a client wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    pub structured: bool,
    /// It may ask for [`ALLOCATION_CONTEXT`].
    pub allocation: bool,
    /// It may say whether all is written.
    pub finished: bool,
}

/// Answers a client's options until it uses the export. None if it has looked only, and goes.
///
/// # Errors
/// If it does not speak NBD.
pub async fn greet(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    offer: &Offer,
) -> Result<Option<Agreed>, HandshakeError> {
    let ours = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let mut hello = wire::SERVER_MAGIC.to_be_bytes().to_vec();
    hello.extend(wire::OPTION_MAGIC.to_be_bytes());
    hello.extend(ours.to_be_bytes());
    stream.write_all(&hello).await?;
    let theirs = stream.read_u32().await?;
    if theirs & !u32::from(ours) != 0 {
        return Err(HandshakeError::protocol(format!(
            "the client's flags are {theirs:#x}: {ours:#x} were offered"
        )));
    }
    let zeroes = theirs & u32::from(handshake::NO_ZEROES) == 0;
    let mut agreed = Agreed::default();
    for _ in 0..MAX_OPTIONS {
        if stream.read_u64().await? != wire::OPTION_MAGIC {
            return Err(HandshakeError::protocol("the client speaks no NBD"));
        }
        let (option, len) = (stream.read_u32().await?, stream.read_u32().await?);
        if len > MAX_OPTION {
            return Err(HandshakeError::protocol(format!(
                "the client's option {option} has {len} bytes"
            )));
        }
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data).await?;
        if option == option::EXPORT_NAME {
            // There is no other way to say no.
            if !offer.has_name(&data) {
                return Err(HandshakeError::protocol(format!(
                    "the client wants export '{}', and there is '{}'",
                    String::from_utf8_lossy(&data).escape_debug(),
                    offer.name
                )));
            }
            let mut reply = offer.size.to_be_bytes().to_vec();
            reply.extend(offer.flags_for(&agreed).to_be_bytes());
            if zeroes {
                reply.extend([0; 124]);
            }
            stream.write_all(&reply).await?;
            return Ok(Some(agreed));
        }
        let mut replies = Replies {
            option,
            bytes: Vec::new(),
        };
        let uses = offer.answer(option, &data, &mut agreed, &mut replies);
        let sent = stream.write_all(&replies.bytes).await;
        match uses {
            // Who goes need not wait for the answer.
            Next::Gone => return Ok(None),
            Next::Uses => return sent.map(|()| Some(agreed)).map_err(Into::into),
            Next::Option => sent?,
        }
    }
    Err(HandshakeError::protocol(
        "the client has too many options and never begins",
    ))
}

enum Next {
    Option,
    Uses,
    Gone,
}

struct Replies {
    option: u32,
    bytes: Vec<u8>,
}

impl Replies {
    fn add(&mut self, kind: u32, data: &[u8]) {
        self.bytes
            .extend(wire::option_reply(self.option, kind, data));
    }
}

impl Offer {
    /// Without structured replies none can be asked to be in one piece.
    fn flags_for(&self, agreed: &Agreed) -> u16 {
        match agreed.structured {
            true => self.flags,
            false => self.flags & !wire::transmission::SEND_DF,
        }
    }

    fn has_name(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.name.as_bytes()
    }

    fn answer(&self, option: u32, data: &[u8], agreed: &mut Agreed, replies: &mut Replies) -> Next {
        match option {
            option::ABORT => {
                replies.add(option_reply::ACK, &[]);
                return Next::Gone;
            }
            option::LIST if !data.is_empty() => replies.add(option_reply::INVALID, &[]),
            option::LIST => {
                let mut server = Vec::new();
                wire::put_string(&mut server, &self.name);
                server.extend(self.description.as_bytes());
                replies.add(option_reply::SERVER, &server);
                replies.add(option_reply::ACK, &[]);
            }
            option::INFO | option::GO => match self.information(data, agreed) {
                Ok(all) => {
                    all.iter()
                        .for_each(|data| replies.add(option_reply::INFO, data));
                    replies.add(option_reply::ACK, &[]);
                    if option == option::GO {
                        return Next::Uses;
                    }
                }
                Err(kind) => replies.add(kind, &[]),
            },
            option::STRUCTURED_REPLY if !data.is_empty() => replies.add(option_reply::INVALID, &[]),
            option::STRUCTURED_REPLY => {
                agreed.structured = true;
                replies.add(option_reply::ACK, &[]);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let sets = option == option::SET_META_CONTEXT;
                if sets {
                    (agreed.allocation, agreed.finished) = (false, false);
                }
                let found = match agreed.structured {
                    true => self.contexts(data, sets),
                    false => Err(option_reply::INVALID),
                };
                match found {
                    Ok(found) => {
                        for (name, id) in found {
                            let told = if sets { id } else { 0 };
                            let mut context = told.to_be_bytes().to_vec();
                            context.extend(name.as_bytes());
                            replies.add(option_reply::META_CONTEXT, &context);
                            agreed.allocation |= sets && id == ALLOCATION_CONTEXT;
                            agreed.finished |= sets && id == FINISHED_CONTEXT;
                        }
                        replies.add(option_reply::ACK, &[]);
                    }
                    Err(kind) => replies.add(kind, &[]),
                }
            }
            _ => replies.add(option_reply::UNSUPPORTED, &[]),
        }
        Next::Option
    }

    /// What INFO and GO tell.
    fn information(&self, data: &[u8], agreed: &Agreed) -> Result<Vec<Vec<u8>>, u32> {
        let parse = || {
            let mut r = Reader(data);
            let name = r.string()?;
            let count = r.u16()?;
            let wanted: Option<Vec<u16>> = (0..count).map(|_| r.u16()).collect();
            (name.len() <= MAX_NAME && r.is_empty()).then_some((name, wanted?))
        };
        let (name, wanted) = parse().ok_or(option_reply::INVALID)?;
        if !self.has_name(name.as_bytes()) {
            return Err(option_reply::UNKNOWN);
        }
        let mut export = info::EXPORT.to_be_bytes().to_vec();
        export.extend(self.size.to_be_bytes());
        export.extend(self.flags_for(agreed).to_be_bytes());
        let mut blocks = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for n in [self.min_block, self.preferred_block, MAX_PAYLOAD] {
            blocks.extend(n.to_be_bytes());
        }
        let mut all = vec![export, blocks];
        let text = |kind: u16, text: &str| {
            let mut data = kind.to_be_bytes().to_vec();
            data.extend(text.as_bytes());
            data
        };
        if wanted.contains(&info::NAME) {
            all.push(text(info::NAME, &self.name));
        }
        if wanted.contains(&info::DESCRIPTION) && !self.description.is_empty() {
            all.push(text(info::DESCRIPTION, &self.description));
        }
        Ok(all)
    }

    /// The contexts that are asked for, with their numbers: all of them if none is, and it is only asked what there is.
    fn contexts(&self, data: &[u8], sets: bool) -> Result<Vec<(&'static str, u32)>, u32> {
        let parse = || {
            let mut r = Reader(data);
            let name = r.string()?;
            let count = r.u32()?;
            let mut found: Vec<(&str, u32)> = match count == 0 && !sets {
                true => CONTEXTS.to_vec(),
                false => Vec::new(),
            };
            for _ in 0..count {
                let query = r.string()?;
                // A namespace alone asks for all that is in it.
                let is_wanted = |name: &str| {
                    name == query || !sets && query.ends_with(':') && name.starts_with(query)
                };
                for context in CONTEXTS {
                    if is_wanted(context.0) && !found.contains(&context) {
                        found.push(context);
                    }
                }
            }
            (name.len() <= MAX_NAME && r.is_empty()).then_some((name, found))
        };
        let (name, found) = parse().ok_or(option_reply::INVALID)?;
        match self.has_name(name.as_bytes()) {
            true => Ok(found),
            false => Err(option_reply::UNKNOWN),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client;
    use std::os::unix::net::UnixStream;

    fn offer() -> Offer {
        Offer {
            name: "disk".into(),
            description: "a disk".into(),
            size: 1 << 20,
            flags: wire::transmission::HAS_FLAGS | wire::transmission::SEND_FLUSH,
            min_block: 512,
            preferred_block: 4096,
        }
    }

    /// What client and server say when the client asks for a name.
    fn meet(
        name: &str,
    ) -> (
        Result<client::Offered, HandshakeError>,
        Result<Option<Agreed>, HandshakeError>,
    ) {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || {
            theirs.set_nonblocking(true).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let mut stream = tokio::net::UnixStream::from_std(theirs).unwrap();
                greet(&mut stream, &offer()).await
            })
        });
        let said = client::greet(&mut ours, name);
        drop(ours);
        (said, server.join().unwrap())
    }

    #[test]
    fn client_and_server_agree() {
        for name in ["disk", ""] {
            let (offered, agreed) = meet(name);
            let offered = offered.unwrap();
            assert_eq!((offered.size, offered.flags), (1 << 20, offer().flags));
            assert_eq!((offered.min_block, offered.max_payload), (512, MAX_PAYLOAD));
            assert_eq!(offered.allocation, Some(ALLOCATION_CONTEXT));
            assert_eq!(offered.finished, Some(FINISHED_CONTEXT));
            let both = Agreed {
                structured: true,
                allocation: true,
                finished: true,
            };
            assert_eq!(agreed.unwrap(), Some(both));
        }
        let (refused, agreed) = meet("other");
        let e = refused.unwrap_err().to_string();
        assert!(e.contains("no such export"), "{e}");
        assert!(agreed.is_err(), "it has ended the connection");
    }

    #[test]
    fn whatever_a_client_says_is_answered_or_ends_it() {
        use proptest::prelude::*;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        proptest!(|(flags in 0u32..6, options: Vec<(u32, Vec<u8>)>)| {
            let mut said = flags.to_be_bytes().to_vec();
            for (option, data) in &options {
                said.extend(wire::option_request(option % 12, data));
            }
            let mut out = Vec::new();
            let mut stream = tokio::io::join(&said[..], &mut out);
            let _ = runtime.block_on(greet(&mut stream, &offer()));
        });
    }
}
