//! What users of a node may do, and let others do (QEMU's `BLK_PERM_*`).

use std::fmt;

/// A set of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Permissions(u8);

impl Permissions {
    pub const NONE: Permissions = Permissions(0);
    /// The data read is what the guest last wrote.
    pub const CONSISTENT_READ: Permissions = Permissions(1);
    pub const WRITE: Permissions = Permissions(2);
    /// Write what does not change what a reader sees.
    pub const WRITE_UNCHANGED: Permissions = Permissions(4);
    pub const RESIZE: Permissions = Permissions(8);
    pub const ALL: Permissions = Permissions(15);

    const NAMES: [(Permissions, &'static str); 4] = [
        (Permissions::CONSISTENT_READ, "consistent-read"),
        (Permissions::WRITE, "write"),
        (Permissions::WRITE_UNCHANGED, "write-unchanged"),
        (Permissions::RESIZE, "resize"),
    ];

    pub const fn and(self, other: Permissions) -> Permissions {
        Permissions(self.0 | other.0)
    }

    pub const fn both(self, other: Permissions) -> Permissions {
        Permissions(self.0 & other.0)
    }

    pub const fn without(self, other: Permissions) -> Permissions {
        Permissions(self.0 & !other.0)
    }

    pub const fn contains(self, other: Permissions) -> bool {
        self.0 & other.0 == other.0
    }

    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The bits, in QEMU's order from bit 0, as image locks use them.
    pub const fn bits(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Permissions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for (bit, name) in Permissions::NAMES {
            if self.contains(bit) {
                if !first {
                    f.write_str(", ")?;
                }
                first = false;
                f.write_str(name)?;
            }
        }
        if first {
            f.write_str("nothing")
        } else {
            Ok(())
        }
    }
}

/// What one user takes, and what it lets the others take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub taken: Permissions,
    pub shared: Permissions,
}

impl Use {
    /// What of `self` is in the way of `other`: what one takes and the other does not share.
    pub fn conflict(&self, other: &Use) -> Option<Permissions> {
        let blocked = other
            .taken
            .without(self.shared)
            .and(self.taken.without(other.shared));
        (!blocked.is_empty()).then_some(blocked)
    }

    /// The use of somebody who acts for both.
    pub fn merge(self, other: Use) -> Use {
        Use {
            taken: self.taken.and(other.taken),
            shared: self.shared.both(other.shared),
        }
    }
}

/// What the driver of an image format does to a child on its own account, whoever uses the image: it has tables to
/// write, and to trust.
pub(crate) fn image_child_use(role: &str, writable: bool) -> Use {
    let read = Permissions::CONSISTENT_READ;
    Use {
        taken: if writable && role != "backing" {
            read.and(Permissions::WRITE).and(Permissions::RESIZE)
        } else {
            read
        },
        shared: read.and(Permissions::WRITE_UNCHANGED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const READER: Use = Use {
        taken: Permissions::CONSISTENT_READ,
        shared: Permissions::ALL,
    };
    const WRITER: Use = Use {
        taken: Permissions::CONSISTENT_READ.and(Permissions::WRITE),
        shared: Permissions::ALL.without(Permissions::WRITE),
    };

    #[test]
    fn writers_exclude_each_other_and_tolerate_readers() {
        assert_eq!(READER.conflict(&WRITER), None);
        assert_eq!(WRITER.conflict(&WRITER), Some(Permissions::WRITE));
        assert_eq!(WRITER.merge(READER), WRITER);
        assert_eq!(WRITER.taken.to_string(), "consistent-read, write");
    }
}
