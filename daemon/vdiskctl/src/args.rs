//! The command line. Help, completion and the man page all come from here.

use clap::{Args as ClapArgs, Parser, Subcommand};

/// Controls vdiskd, the storage daemon for virtual machines
///
/// Options of nodes and exports have the names of QEMU's QAPI and are given as KEY=VALUE, nested ones with
/// dots (cache.direct=on). Sizes may have a unit (10G).
///
/// Exit codes: 0 success, 1 failure, 2 wrong option or not supported, 3 no such object, 4 exists already or
/// in use, 5 not allowed, 6 the daemon cannot be reached.
#[derive(Debug, Parser)]
#[command(name = "vdiskctl", version, max_term_width = 100)]
pub struct Args {
    #[command(flatten)]
    pub connection: Connection,

    /// Print JSON for scripts
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

/// Which daemon is meant.
#[derive(Clone, Debug, ClapArgs)]
pub struct Connection {
    /// Use the session bus instead of the system bus
    #[arg(long, global = true, conflicts_with = "bus_address")]
    pub session: bool,

    /// Use the bus at this D-Bus address
    #[arg(long, global = true, value_name = "ADDRESS", env = "VDISK_BUS_ADDRESS")]
    pub bus_address: Option<String>,

    /// Talk to this instance (vdiskd@NAME.service) instead of the usual daemon
    #[arg(long, global = true, value_name = "NAME", env = "VDISK_INSTANCE")]
    pub instance: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Nodes of the block graph: images, devices, filters
    #[command(subcommand)]
    Node(Node),
    /// Images in files: make, look at, check, repair
    #[command(subcommand)]
    Image(Image),
    /// Secrets, which open encrypted images
    #[command(subcommand)]
    Secret(Secret),
    /// Throttle groups: limits that nodes have together
    #[command(subcommand)]
    Throttle(Throttle),
    /// Snapshots: overlays over nodes that are in use, and those inside an image
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Nodes that show what another had at one moment, while guests write
    #[command(subcommand)]
    Fleece(Fleece),
    /// Copy a node as it is at this moment, while guests write
    ///
    /// Example: vdiskctl backup disk0 /srv/backup/disk0.qcow2 --compress
    Backup {
        node: String,
        #[command(flatten)]
        copy: Copy,
    },
    /// Copy a node while guests write, until the copy has everything; it may take the node's place
    ///
    /// Example: vdiskctl mirror disk0 /fast/disk0.qcow2 --name disk0-fast --pivot
    Mirror(Mirror),
    /// Copy an image that nobody writes to, in another format or without what it does not need
    ///
    /// Example: vdiskctl convert /srv/vm1.qcow2 /srv/vm1.raw --format raw
    Convert(Convert),
    /// Put what an overlay has into its backing file, while guests write
    ///
    /// A backing file that exports use from then on takes the overlay's place. The overlay is closed; its file is not needed
    /// any more.
    ///
    /// Example: vdiskctl commit disk0-monday
    Commit(Merge),
    /// Put what an overlay reads from its backing file into the overlay, while guests write
    ///
    /// Example: vdiskctl stream disk0-monday
    Stream(Merge),
    /// Give back the space of what is zeroes, while guests write
    ///
    /// Example: vdiskctl discard disk0
    ///
    /// Example: vdiskctl discard /srv/vm1.qcow2
    Discard(Discard),
    /// Do several things at one instant, or none of them
    ///
    /// Actions: add-overlay, backup, bitmap-add, bitmap-remove, bitmap-clear, bitmap-enable, bitmap-disable and bitmap-merge
    /// (sources=A+B), each with node=… and its options.
    ///
    /// Example: vdiskctl transaction backup,node=disk0,target=copy0 bitmap-add,node=disk0,name=monday
    Transaction {
        /// KIND,KEY=VALUE,…
        #[arg(value_name = "ACTION", required = true)]
        actions: Vec<String>,
        /// The backups take effect together, or none does
        #[arg(long)]
        grouped: bool,
    },
    /// Dirty bitmaps: what was written since some moment
    #[command(subcommand)]
    Bitmap(BitmapCommand),
    /// Jobs: long work on nodes
    #[command(subcommand)]
    Job(JobCommand),
    /// Exports: nodes offered to guests
    #[command(subcommand)]
    Export(Export),
    /// I/O threads
    #[command(subcommand, name = "iothread")]
    IoThread(IoThread),
    /// Show what stands on what
    Tree,
    /// Show what exports and I/O threads have done
    Stats(Stats),
    /// Show how the daemon is: what it serves, what is amiss
    Status,
    /// Show which exports and I/O threads are busy, again and again
    ///
    /// Keys: s for another order, q to quit. Where there is no terminal it is shown once.
    Top {
        /// Seconds between looks
        #[arg(long, short, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=3600))]
        delay: u64,
        /// Print so many times and end
        #[arg(long, short = 'n', value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
        iterations: Option<u64>,
    },
    /// Show version, engine, drivers and export kinds of the daemon
    Info,
    /// libvirt's domains and their disks: what vdiskctl-domain(1) does
    #[command(disable_help_flag = true)]
    Domain {
        #[arg(
            value_name = "ARGS",
            trailing_var_arg = true,
            allow_hyphen_values = true
        )]
        args: Vec<std::ffi::OsString>,
    },
    /// Print a completion script for a shell
    Completion { shell: clap_complete::Shell },
    /// Print the man page
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Subcommand)]
pub enum Fleece {
    /// Keep what a node has at this moment, and show it as another node, which can be exported and copied
    ///
    /// What guests overwrite is copied to a scratch image first.
    ///
    /// Example: vdiskctl fleece start disk0 disk0-noon /var/tmp/disk0-noon.qcow2
    Start {
        node: String,
        /// The new node's name
        name: String,
        /// The scratch image, which is made
        filename: String,
        /// A write fails if what it overwrites cannot be copied; otherwise the moment is lost
        #[arg(long)]
        break_guest_write: bool,
        /// Options of the filter between, such as target.file.cache.direct=on
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Give the moment up; the scratch image is deleted
    End {
        /// The node that shows it
        name: String,
    },
}

#[derive(Debug, clap::Args)]
pub struct Discard {
    /// A node, or the file of an image that nobody uses (with a '/' in its name)
    #[arg(value_name = "NODE|FILE")]
    pub source: String,
    /// Format of an image in a file
    #[arg(short, long, default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    pub format: String,
    /// Bytes per second at most (100M)
    #[arg(long)]
    pub speed: Option<String>,
    /// Do not wait for it
    #[arg(long)]
    pub detach: bool,
    /// Options of the job, such as job-id=NAME
    #[arg(value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// Open an image or device and add it to the graph
    ///
    /// Example: vdiskctl node add disk0 driver=file filename=/srv/disk0.img cache.direct=on
    Add {
        /// The new node's name
        name: String,
        /// Open files here, with your own rights, and pass them: the daemon needs none of its own
        #[arg(long)]
        pass: bool,
        /// Options: driver=… and what the driver takes
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
    /// Close a node that nothing uses
    Remove { name: String },
    /// List all nodes
    List,
    /// Show one node
    Show { name: String },
    /// Change the size of a node; guests notice
    Resize {
        name: String,
        /// The new size (20G), or what to add to it (+5G)
        size: String,
        /// Allow the node to become smaller, losing what is cut off
        #[arg(long)]
        shrink: bool,
    },
    /// Change options of a node, while guests use it
    ///
    /// Example: vdiskctl node set disk0 discard=unmap detect-zeroes=unmap
    Set {
        name: String,
        /// Options: read-only, discard and detect-zeroes are changed at once; for others (cache.direct=on, l2-cache-size=8M) its images are opened again while guests wait
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
    /// Open the images of a node that is inactive, and of those below it
    Activate { name: String },
    /// Let go of the images of an export's node, for another host to open them; the export stays, and waits
    Deactivate { name: String },
    /// Have whatever uses a node use another that has the same data
    ///
    /// Example: vdiskctl node replace disk0 disk0-restored
    Replace {
        name: String,
        /// The other node, which nobody uses
        with: String,
    },
    /// Have a signal sent when a write reaches beyond an offset, and optionally wait for it
    ///
    /// Example: vdiskctl node threshold lv0 18G --wait
    Threshold {
        name: String,
        /// The offset (18G), or 0 for none
        offset: String,
        /// Wait until it is reached
        #[arg(long)]
        wait: bool,
    },
    /// Put a filter over a node, while guests use it
    ///
    /// Example: vdiskctl node insert disk0 disk0-cor driver=copy-on-read
    Insert {
        node: String,
        /// The filter's name
        name: String,
        /// Options: driver=throttle, copy-on-read or blkdebug, and what the driver takes
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
    /// Take a filter out again, while guests use it
    TakeOut { name: String },
    /// Make everything durable that was written
    Flush { name: String },
    /// Have a request go on that a blkdebug node has suspended
    ///
    /// Example: vdiskctl node go-on debug0 first-write
    GoOn { name: String, tag: String },
    /// Check the qcow2 image of a node; guests wait meanwhile
    Check {
        name: String,
        /// What to repair
        #[arg(long, value_name = "WHAT", value_parser = ["leaks", "all"])]
        repair: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Secret {
    /// Make a passphrase known to the daemon
    ///
    /// Without --file it is asked for, or read from standard input up to its end (every byte belongs to it, a newline at
    /// the end, too). It reaches the daemon through a file descriptor, not in a message.
    ///
    /// Example: vdiskctl secret add vm1 --file /etc/vdisk/vm1.key
    Add {
        /// The new secret's id
        id: String,
        /// Read it from this file
        #[arg(long, value_name = "FILE")]
        file: Option<std::path::PathBuf>,
    },
    /// Forget a secret; what it has opened stays open
    Remove { id: String },
    /// List the ids of all secrets
    List,
}

/// What an image is found by.
#[derive(Debug, ClapArgs)]
pub struct ImageFile {
    /// The file or device
    pub filename: String,
    /// Format of the image
    #[arg(short, long, default_value = "qcow2", value_parser = ["qcow2", "raw", "luks"])]
    pub format: String,
    /// Look although somebody else writes to it
    #[arg(short = 'U', long)]
    pub force_share: bool,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Make an image
    ///
    /// Example: vdiskctl image create /srv/vm1.qcow2 20G cluster-size=1M
    ///
    /// Encrypted: vdiskctl image create /srv/vm1.qcow2 20G encrypt.format=luks encrypt.key-secret=vm1
    Create {
        filename: String,
        /// Size of the disk (20G)
        size: String,
        /// Format of the image
        #[arg(short, long, default_value = "qcow2", value_parser = ["qcow2", "raw", "luks"])]
        format: String,
        /// The image is an overlay of this one
        #[arg(short, long, value_name = "FILE", requires = "backing_format")]
        backing: Option<String>,
        /// Format of the image below
        #[arg(short = 'F', long, value_name = "FORMAT")]
        backing_format: Option<String>,
        /// Lose what is there already
        #[arg(long)]
        overwrite: bool,
        /// Do not wait for it
        #[arg(long)]
        detach: bool,
        /// Options: cluster-size=1M, preallocation=metadata, version=v2, extended-l2=on, data-file=NAME,
        /// encrypt.format=luks, encrypt.key-secret=ID (key-secret=ID for format luks), …
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Show what an image is
    Info(ImageFile),
    /// Look for damage in a qcow2 image that nobody uses
    Check(ImageFile),
    /// Repair a qcow2 image that nobody uses
    Repair {
        #[command(flatten)]
        file: ImageFile,
        /// Only give back clusters that nothing refers to
        #[arg(long)]
        leaks: bool,
    },
    /// Show what the file of a new image would take: an empty one, or a copy of what there is
    ///
    /// Example: vdiskctl image measure /srv/vm1.qcow2 -f raw
    Measure {
        /// Size of the disk (20G), or what would be copied: a file (a path with a slash in it), or a node
        source: String,
        #[command(flatten)]
        from: Source,
        /// Format of the image
        #[arg(short, long, default_value = "qcow2", value_parser = ["qcow2", "raw", "luks"])]
        format: String,
        /// Options as of create
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Show where the data of a qcow2 image is
    Map(ImageFile),
    /// Change a qcow2 image that nobody uses
    ///
    /// Example: vdiskctl image amend /srv/vm1.qcow2 backing-file=/srv/base.qcow2 backing-fmt=qcow2
    Amend {
        filename: String,
        /// Options: version=v3, lazy-refcounts=off, backing-file=… backing-fmt=… (empty for none),
        /// data-file=… (for one that was renamed)
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Throttle {
    /// Make a group, or give it other limits; what is not given is not limited
    ///
    /// Limits: bps-total, bps-read, bps-write (bytes per second), iops-total, iops-read, iops-write (requests per second), each
    /// with -max (the rate of a burst) and -max-length (seconds that one may last), and iops-size.
    ///
    /// Example: vdiskctl throttle set gold iops-total=2000 iops-total-max=5000 bps-total=200M
    Set {
        /// The group
        group: String,
        #[arg(value_name = "KEY=VALUE")]
        limits: Vec<String>,
    },
    /// List the groups with their limits
    List,
    /// Remove a group that limits nothing
    Remove { group: String },
    /// Put a node under the limits of a group, while guests use it
    ///
    /// Example: vdiskctl throttle insert disk0 gold
    Insert {
        node: String,
        group: String,
        /// The name of the new filter node; the node's with '-throttle' if not given
        #[arg(long)]
        name: Option<String>,
    },
    /// Take a filter node out again, while guests use it
    TakeOut {
        /// The filter's name
        filter: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Put a new overlay over a node, while guests use it
    ///
    /// The exports of the node offer the overlay from now on. The node keeps what was written so far, and is read-only.
    ///
    /// Example: vdiskctl snapshot overlay disk0 disk0-monday /srv/disk0-monday.qcow2
    Overlay {
        node: String,
        /// The overlay's name
        name: String,
        /// The overlay's image, which is made
        filename: String,
        /// The image is there already
        #[arg(long)]
        existing: bool,
        /// Options of the overlay's node, such as discard=unmap or file.cache.direct=on
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Make a snapshot inside a node's image
    Create { node: String, name: String },
    /// List the snapshots in a node's image
    List { node: String },
    /// Make the disk what it was; what was written since is lost
    Apply {
        node: String,
        /// Name or id
        snapshot: String,
    },
    /// Delete a snapshot
    Delete {
        node: String,
        /// Name or id
        snapshot: String,
    },
}

/// Where something is copied to, and how.
#[derive(Debug, ClapArgs)]
pub struct Copy {
    /// The image of the copy, which is made; or a server's disk of the same size (nbd+unix:///EXPORT?socket=PATH)
    pub filename: String,
    /// Format of the copy
    #[arg(short, long, default_value = "qcow2", value_parser = ["qcow2", "raw"])]
    pub format: String,
    /// The image is there already, with the same size
    #[arg(long)]
    pub existing: bool,
    /// The name of the copy's node
    #[arg(long)]
    pub name: Option<String>,
    /// What is copied: everything, what the node has without its backing file, what is written from now on, or (backup)
    /// what a bitmap has
    #[arg(long, value_parser = ["full", "top", "none", "incremental", "bitmap"])]
    pub sync: Option<String>,
    /// Write compressed clusters
    #[arg(long)]
    pub compress: bool,
    /// Bytes per second at most (50M)
    #[arg(long)]
    pub speed: Option<String>,
    /// Start it and come back at once
    #[arg(long)]
    pub detach: bool,
    /// An option of the copy's node, such as file.cache.direct=on
    #[arg(long, value_name = "KEY=VALUE")]
    pub target: Vec<String>,
    /// Options of the job: job-id=…, on-target-error=stop, iothread=…
    #[arg(value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Mirror {
    pub node: String,
    #[command(flatten)]
    pub copy: Copy,
    /// Have the copy take the node's place as soon as it has everything
    #[arg(long, conflicts_with = "detach")]
    pub pivot: bool,
    /// Have writes of guests go to both before they are answered
    #[arg(long)]
    pub write_blocking: bool,
}

#[derive(Debug, ClapArgs)]
pub struct Merge {
    pub node: String,
    /// The node below that remains (the backing file for commit, none for stream)
    #[arg(long, value_name = "NODE")]
    pub base: Option<String>,
    /// Bytes per second at most (50M)
    #[arg(long)]
    pub speed: Option<String>,
    /// Start it and come back at once
    #[arg(long)]
    pub detach: bool,
    /// Options of the job: job-id=…, backing-file=…, iothread=…
    #[arg(value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

/// How a file is opened that is a source.
#[derive(Debug, ClapArgs)]
pub struct Source {
    /// Format of the source, if it is a file
    #[arg(short = 'F', long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2", "raw", "luks"])]
    pub from: String,
    /// An option of the source's node, such as backing.driver=… or key-secret=…
    #[arg(id = "source-option", long = "source", value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

#[derive(Debug, ClapArgs)]
pub struct Convert {
    /// A file (a path with a slash in it), or a node
    pub source: String,
    #[command(flatten)]
    pub from: Source,
    #[command(flatten)]
    pub copy: Copy,
}

#[derive(Debug, ClapArgs)]
pub struct Bitmap {
    pub node: String,
    /// The bitmap's name
    pub name: String,
}

#[derive(Debug, Subcommand)]
pub enum BitmapCommand {
    /// Record what is written to a node from now on
    Add {
        #[command(flatten)]
        bitmap: Bitmap,
        /// Bytes that one bit stands for (64k)
        #[arg(long)]
        granularity: Option<String>,
        /// Do not record yet
        #[arg(long)]
        disabled: bool,
        /// Have the image keep it (qcow2)
        #[arg(long)]
        persistent: bool,
    },
    /// Forget a bitmap
    Remove(Bitmap),
    /// List the bitmaps of all nodes
    List,
    /// Begin anew: nothing is dirty
    Clear(Bitmap),
    /// Record writes from now on
    Enable(Bitmap),
    /// Record no writes from now on
    Disable(Bitmap),
    /// Add what other bitmaps of the node have
    Merge {
        #[command(flatten)]
        bitmap: Bitmap,
        #[arg(required = true)]
        sources: Vec<String>,
    },
}

#[derive(Debug, ClapArgs)]
pub struct Job {
    /// The job's id
    pub id: String,
}

#[derive(Debug, Subcommand)]
pub enum JobCommand {
    /// List all jobs
    List,
    /// Show one job
    Show(Job),
    /// Show the progress of a job until it has ended, is ready, or has paused
    Watch(Job),
    /// Have a job begin nothing more
    Pause(Job),
    /// Let a job go on that has paused
    Resume(Job),
    /// End a job without effect; a mirror that is ready ends with a complete copy
    Cancel {
        #[command(flatten)]
        job: Job,
        /// Do not complete the copy of a mirror that is ready
        #[arg(long)]
        force: bool,
    },
    /// Have a mirror's copy take the node's place
    Complete(Job),
    /// Have a job take effect that waits for this (auto-finalize=false)
    Finalize(Job),
    /// Forget a job that has ended (auto-dismiss=false)
    Dismiss(Job),
    /// Limit a job's speed
    Speed {
        #[command(flatten)]
        job: Job,
        /// Bytes per second (50M); 0 for no limit
        speed: String,
    },
    /// Change a job while it runs
    Set {
        #[command(flatten)]
        job: Job,
        /// Options: copy-mode=write-blocking
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub enum Export {
    /// Offer a node to a guest, or (nbd) to programs
    ///
    /// Examples: vdiskctl export add vm1-vda --node disk0 --socket /run/vdiskd/vm1-vda.sock --writable;
    /// vdiskctl export add disk0-nbd --type nbd --node disk0 --socket /run/vdiskd/disk0-nbd.sock
    Add(AddExport),
    /// Change an export: persistent=on has it come back when the machine starts, with everything that it stands on
    ///
    /// Example: vdiskctl export set vm1-vda persistent=on
    Set {
        id: String,
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
    /// End an export
    Remove { id: String },
    /// List all exports
    List,
    /// Show one export
    Show { id: String },
}

#[derive(Debug, ClapArgs)]
pub struct AddExport {
    /// The new export's id
    pub id: String,
    /// Kind of export: vhost-user-blk, nbd
    #[arg(long = "type", default_value = "vhost-user-blk")]
    pub kind: String,
    /// The node to offer
    #[arg(long, value_name = "NODE")]
    pub node: String,
    /// Path of the unix socket to make, or fd:NAME for one that systemd passed (FileDescriptorName= of vdiskd.socket)
    #[arg(long, value_name = "PATH|fd:NAME")]
    pub socket: Option<String>,
    /// Have it come back when the machine starts, with everything that it stands on
    #[arg(long)]
    pub persistent: bool,
    /// Let the guest write
    #[arg(long)]
    pub writable: bool,
    /// Queues to offer, 1 to 64 (64 if not given: a guest uses as many as it has CPUs)
    #[arg(long, value_name = "N")]
    pub queues: Option<u16>,
    /// What the guest reads as the disk's serial, at most 20 bytes
    #[arg(long)]
    pub serial: Option<String>,
    /// I/O threads that take the queues in turn
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub iothread: Vec<String>,
    /// Pin a queue to an I/O thread
    #[arg(long, value_name = "QUEUE=NAME")]
    pub pin: Vec<String>,
    /// Further options (logical-block-size=4096, socket-mode=0660, …)
    #[arg(value_name = "KEY=VALUE")]
    pub options: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum IoThread {
    /// Start an I/O thread
    Add {
        name: String,
        /// Options: cpus=0,2-3, poll-max-ns=32000
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
    /// Change an I/O thread
    Set {
        name: String,
        /// Options: poll-max-ns=0
        #[arg(value_name = "KEY=VALUE", required = true)]
        options: Vec<String>,
    },
    /// End an I/O thread that serves nothing
    Remove { name: String },
    /// List all I/O threads
    List,
    /// Show one I/O thread
    Show { name: String },
}

#[derive(Debug, ClapArgs)]
pub struct Stats {
    /// Only this export
    pub export: Option<String>,
    /// Print the difference every so many seconds until interrupted
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub watch: Option<u64>,
}
