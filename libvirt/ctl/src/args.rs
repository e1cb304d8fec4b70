//! The command line.

use clap::{Args as ClapArgs, Parser, Subcommand};
use vdiskctl::args::Connection;

/// Domains of libvirt whose disks vdiskd serves
///
/// Disks are named by their targets (vda), as in virsh. Settings of disks are given as KEY=VALUE: format, readonly, serial, cache,
/// discard, detect-zeroes, queues, iothread, secret, group.
///
/// Exit codes are those of vdiskctl(1).
#[derive(Debug, Parser)]
#[command(
    name = "vdiskctl domain",
    bin_name = "vdiskctl domain",
    version,
    max_term_width = 100
)]
pub struct Args {
    #[command(flatten)]
    pub daemon: Connection,

    /// libvirt's daemon
    #[arg(
        short,
        long,
        global = true,
        value_name = "URI",
        env = "LIBVIRT_DEFAULT_URI",
        default_value = "qemu:///system"
    )]
    pub connect: String,

    /// Print JSON for scripts
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the disks of domains that vdiskd serves
    List {
        /// Disks that it does not serve, too
        #[arg(long)]
        all: bool,
    },
    /// Take down what vdiskd serves for nobody: disks of domains that do not run, or do not have them any more
    ///
    /// Such are left when virsh takes a disk from a domain that runs, or when a hook could not run; list calls them orphans.
    Cleanup {
        /// Only show what would be taken down
        #[arg(long)]
        dry_run: bool,
    },
    /// Show the disks of a domain, with their images and what they have done
    Info { domain: String },
    /// Have vdiskd serve disks of a domain that is shut off
    ///
    /// Files and block devices on virtio become vhost-user disks; their cache mode, limits, serial and so on go on. The image belongs to
    /// vdiskd's user from then on.
    ///
    /// Example: vdiskctl domain adopt vm1 --dry-run
    Adopt {
        domain: String,
        /// Targets of the disks (all that can be, if not given)
        disks: Vec<String>,
        /// Only show what would change
        #[arg(long)]
        dry_run: bool,
        /// A setting of the disks, such as iothread=fast or cache=none
        #[arg(long = "set", value_name = "KEY=VALUE")]
        settings: Vec<String>,
    },
    /// Make disks what they were before vdiskd served them; the domain is shut off
    ///
    /// What was written since stays.
    Release {
        domain: String,
        /// Targets of the disks (all, if not given)
        disks: Vec<String>,
        /// Only show what would change
        #[arg(long)]
        dry_run: bool,
    },
    /// Give a domain a disk
    ///
    /// Example: vdiskctl domain attach vm1 /srv/vm1-data.qcow2 vdb discard=unmap --persistent
    Attach {
        domain: String,
        /// The image or block device
        file: String,
        target: String,
        #[arg(value_name = "KEY=VALUE")]
        settings: Vec<String>,
        #[command(flatten)]
        when: When,
    },
    /// Take a disk from a domain; its image stays
    Detach {
        domain: String,
        target: String,
        #[command(flatten)]
        when: When,
        /// Seconds that the guest may take to let go of it
        #[arg(long, value_name = "SECONDS", default_value_t = 30)]
        timeout: u64,
    },
    /// What disks were at some moment, all of them at one instant
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Put what was written since a snapshot into the image below, whether the guest runs or not
    #[command(name = "blockcommit")]
    BlockCommit {
        domain: String,
        target: String,
        /// Down to this file (the one below, if not given)
        #[arg(long, value_name = "FILE")]
        base: Option<String>,
        /// Bytes per second at most (50M)
        #[arg(long)]
        speed: Option<String>,
    },
    /// Put what a disk reads from the images below into its own, so that it does not need them any more
    #[command(name = "blockpull")]
    BlockPull {
        domain: String,
        target: String,
        /// The file that stays below
        #[arg(long, value_name = "FILE")]
        base: Option<String>,
        /// Bytes per second at most (50M)
        #[arg(long)]
        speed: Option<String>,
    },
    /// Bring a disk to another file or device, and have the guest use that, which may run
    #[command(name = "blockcopy")]
    BlockCopy {
        domain: String,
        target: String,
        dest: String,
        /// Of the copy (qcow2; raw on a device)
        #[arg(long, value_parser = ["qcow2", "raw"])]
        format: Option<String>,
        /// Leave the guest where it is: the copy is what the disk is at the end
        #[arg(long)]
        finish: bool,
        /// Bytes per second at most (50M)
        #[arg(long)]
        speed: Option<String>,
    },
    /// Back up the disks as they are at one instant, while the guest runs or not: all of them at first, and then what has changed
    ///
    /// Each file stands on the one before it: the newest, with those that it stands on, is the disk (qemu-img convert).
    ///
    /// A server's disk gets all of it each time.
    ///
    /// Examples: vdiskctl domain backup vm1 /backup/vm1;
    /// vdiskctl domain backup vm1 'nbd+unix:///?socket=/run/backup.sock'
    Backup {
        domain: String,
        /// Where they go: a folder, one for each domain; or a server (nbd+unix:///?socket=PATH) with an export for each disk that is called
        /// as it is (vda, …) and of its size, or with one that the URI names (nbd+unix:///EXPORT?socket=PATH)
        #[arg(value_name = "FOLDER|URI")]
        to: String,
        /// Targets of the disks (all, if not given)
        #[arg(long, value_delimiter = ',')]
        disks: Vec<String>,
        /// Everything once more
        #[arg(long)]
        full: bool,
        /// Write compressed clusters
        #[arg(long)]
        compress: bool,
        /// Have the guest agent freeze the guest's file systems for that instant
        #[arg(long)]
        quiesce: bool,
    },
    /// Bring a guest to another host while it runs
    ///
    /// The images are where both hosts find them under the same names, or are brought there first (--copy-storage). Each is open on one
    /// host at a time: the other opens it when this one has let go of it.
    ///
    /// Example: vdiskctl domain migrate vm1 qemu+ssh://host2/system --persistent
    Migrate(Migrate),
    /// Change the size of a disk; a guest that runs notices
    Resize {
        domain: String,
        target: String,
        /// 20G, or +5G
        size: String,
    },
    /// Limit what a disk may do; 0 for no limit
    ///
    /// Example: vdiskctl domain throttle vm1 vda total_iops_sec=500 read_bytes_sec=50M
    Throttle {
        domain: String,
        target: String,
        /// total_, read_ and write_bytes_sec and _iops_sec, with _max and _max_length for bursts, as in virsh blkdeviotune
        #[arg(value_name = "LIMIT=N", required = true)]
        limits: Vec<String>,
    },
    /// Say once when a write reaches beyond an offset of a disk's image
    Threshold {
        domain: String,
        target: String,
        /// Bytes (15G); 0 for none
        offset: String,
        /// Wait for it
        #[arg(long)]
        wait: bool,
    },
    /// Show what the guest has done to its disks
    Stats { domain: String },
    /// Offer a new image to another host
    #[command(hide = true)]
    Receive(Receive),
    /// Print the man page
    #[command(hide = true)]
    Man,
    /// Print a completion script for a shell
    #[command(hide = true)]
    Completion { shell: clap_complete::Shell },
}

impl Command {
    /// The domain whose definition or disks it changes.
    pub fn changes(&self) -> Option<&str> {
        match self {
            Command::Adopt { domain, .. }
            | Command::Release { domain, .. }
            | Command::Attach { domain, .. }
            | Command::Detach { domain, .. }
            | Command::BlockCommit { domain, .. }
            | Command::BlockPull { domain, .. }
            | Command::BlockCopy { domain, .. }
            | Command::Backup { domain, .. }
            | Command::Migrate(Migrate { domain, .. })
            | Command::Resize { domain, .. }
            | Command::Throttle { domain, .. }
            | Command::Snapshot(
                Snapshot::Create { domain, .. }
                | Snapshot::Revert { domain, .. }
                | Snapshot::Delete { domain, .. },
            ) => Some(domain),
            _ => None,
        }
    }
}

#[derive(Debug, ClapArgs)]
pub struct Migrate {
    pub domain: String,
    /// libvirt's daemon there, as this program reaches it
    pub desturi: String,
    /// Where the guest's memory goes (tcp://host2; unix:///path), if libvirt cannot find out
    pub migrateuri: Option<String>,
    /// Keep the definition there when the guest ends
    #[arg(long)]
    pub persistent: bool,
    /// Forget the definition here
    #[arg(long)]
    pub undefinesource: bool,
    /// The two libvirts talk to each other directly
    #[arg(long)]
    pub p2p: bool,
    /// First bring the disks into this folder, which both hosts have
    #[arg(long, value_name = "FOLDER")]
    pub copy_storage: Option<String>,
    /// Copy the disks to the other host while the guest runs, into new images under the same names, as one image each. They
    /// follow the guest until it goes on there; the ones here stay as it has left them
    #[arg(long, conflicts_with = "copy_storage")]
    pub copy_storage_all: bool,
    /// How commands are run on the other host: a program whose last argument is a command line for a shell there [default: ssh to
    /// the host of a qemu+ssh:// URI]
    #[arg(long, value_name = "COMMAND", requires = "copy_storage_all")]
    pub remote_shell: Option<String>,
    /// Bytes per second at most for copies (50M)
    #[arg(long)]
    pub speed: Option<String>,
}

/// The other end of a disk that is copied: what `migrate --copy-storage-all` runs on the other host.
#[derive(Debug, ClapArgs)]
pub struct Receive {
    /// What the node and its export are called
    pub name: String,
    /// The image, which is made
    pub file: String,
    #[arg(long, default_value = "qcow2")]
    pub format: String,
    /// Bytes
    #[arg(long, default_value_t = 0)]
    pub size: u64,
    /// The daemon's secret for it
    #[arg(long)]
    pub secret: Option<String>,
    /// Take all of it away again
    #[arg(long)]
    pub abort: bool,
}

/// What of a domain is changed.
#[derive(Debug, ClapArgs)]
pub struct When {
    /// Only from the next start on
    #[arg(long, conflicts_with_all = ["live", "persistent"])]
    pub config: bool,
    /// Only until the domain ends
    #[arg(long, conflicts_with = "persistent")]
    pub live: bool,
    /// Now, if it runs, and for all times (the default)
    #[arg(long)]
    pub persistent: bool,
}

#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// Make one of the disks that vdiskd serves, while the guest runs or not
    ///
    /// Example: vdiskctl domain snapshot create vm1 before-upgrade --quiesce
    Create {
        domain: String,
        /// Its name (the time, if not given)
        name: Option<String>,
        /// Targets of the disks (all, if not given)
        #[arg(long, value_delimiter = ',')]
        disks: Vec<String>,
        /// The guest's memory, too, into this new file
        #[arg(long, value_name = "FILE")]
        memspec: Option<String>,
        /// Have the guest agent freeze the guest's file systems meanwhile
        #[arg(long, conflicts_with = "memspec")]
        quiesce: bool,
    },
    /// List them, the oldest first
    List { domain: String },
    /// Make the disks what they were then; the domain is shut off, and what was written since is lost
    ///
    /// If the snapshot has the guest's memory, the guest goes on from that moment.
    Revert {
        domain: String,
        name: String,
        /// Leave the guest's memory out
        #[arg(long)]
        disks_only: bool,
        /// Lose the snapshots that were made since, too
        #[arg(long)]
        drop_newer: bool,
    },
    /// Forget one: what was written since goes into its image
    Delete { domain: String, name: String },
}
