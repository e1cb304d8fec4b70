//! Everything that a front-end has negotiated on a connection, as one value that can be stored and taken
//! up again. The file descriptors that belong to it are beside it, in [`Descriptors`].

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// One memory region.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionState {
    pub guest_addr: u64,
    pub size: u64,
    pub user_addr: u64,
    pub mmap_offset: u64,
}

/// One queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VringState {
    pub size: u16,
    pub next_avail: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    /// Guest-physical address under which the used ring is logged, if it is.
    pub log_addr: Option<u64>,
    pub has_addresses: bool,
    pub enabled: bool,
}

/// The inflight area.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InflightState {
    pub mmap_size: u64,
    pub mmap_offset: u64,
    pub num_queues: u16,
    pub queue_size: u16,
}

/// The dirty page log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogState {
    pub size: u64,
    pub offset: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    pub features: u64,
    pub protocol_features: u64,
    pub regions: Vec<RegionState>,
    pub vrings: Vec<VringState>,
    pub inflight: Option<InflightState>,
    pub log: Option<LogState>,
    /// The write cache as the driver set it in the configuration space.
    pub write_cache: bool,
}

/// The descriptors of a queue.
#[derive(Debug, Default)]
pub struct VringDescriptors {
    pub kick: Option<OwnedFd>,
    pub call: Option<OwnedFd>,
    pub err: Option<OwnedFd>,
}

/// The descriptors that belong to a [`State`].
#[derive(Debug, Default)]
pub struct Descriptors {
    /// In the order of `State::regions`.
    pub regions: Vec<OwnedFd>,
    pub vrings: Vec<VringDescriptors>,
    pub inflight: Option<OwnedFd>,
    pub log: Option<OwnedFd>,
    /// The channel for messages of our own.
    pub backend: Option<OwnedFd>,
    /// Readable while a message is being read or answered.
    pub mark: Option<OwnedFd>,
}

impl State {
    pub fn new(num_queues: u16, write_cache: bool) -> State {
        State {
            vrings: vec![VringState::default(); num_queues.into()],
            write_cache,
            ..State::default()
        }
    }
}

impl Descriptors {
    pub fn new(num_queues: u16) -> Descriptors {
        Descriptors {
            vrings: (0..num_queues)
                .map(|_| VringDescriptors::default())
                .collect(),
            ..Descriptors::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_state_survives_serialisation() {
        let mut s = State::new(2, true);
        s.features = u64::MAX;
        s.vrings[1].log_addr = Some(7);
        s.regions.push(RegionState {
            guest_addr: 1,
            size: 2,
            user_addr: 3,
            mmap_offset: 4,
        });
        let text = serde_json::to_string(&s).unwrap();
        assert_eq!(serde_json::from_str::<State>(&text).unwrap(), s);
    }
}
