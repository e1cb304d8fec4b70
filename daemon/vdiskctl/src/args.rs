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
    /// Use the session bus instead of the system bus
    #[arg(long, global = true, conflicts_with = "bus_address")]
    pub session: bool,

    /// Use the bus at this D-Bus address
    #[arg(long, global = true, value_name = "ADDRESS", env = "VDISK_BUS_ADDRESS")]
    pub bus_address: Option<String>,

    /// Print JSON for scripts
    #[arg(long, global = true)]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Nodes of the block graph: images, devices, filters
    #[command(subcommand)]
    Node(Node),
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
    /// Show version, engine, drivers and export kinds of the daemon
    Info,
    /// Print a completion script for a shell
    Completion { shell: clap_complete::Shell },
    /// Print the man page
    #[command(hide = true)]
    Man,
}

#[derive(Debug, Subcommand)]
pub enum Node {
    /// Open an image or device and add it to the graph
    ///
    /// Example: vdiskctl node add disk0 driver=file filename=/srv/disk0.img cache.direct=on
    Add {
        /// The new node's name
        name: String,
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
    /// Make everything durable that was written
    Flush { name: String },
}

#[derive(Debug, Subcommand)]
pub enum Export {
    /// Offer a node to a guest
    ///
    /// Example: vdiskctl export add vm1-vda --node disk0 --socket /run/vdiskd/vm1-vda.sock --writable
    Add(AddExport),
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
    /// Kind of export
    #[arg(long = "type", default_value = "vhost-user-blk")]
    pub kind: String,
    /// The node to offer
    #[arg(long, value_name = "NODE")]
    pub node: String,
    /// Path of the unix socket to make
    #[arg(long, value_name = "PATH")]
    pub socket: Option<String>,
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
