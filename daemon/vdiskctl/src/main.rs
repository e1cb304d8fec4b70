//! vdiskctl: the command line client of vdiskd. Everything it does goes over D-Bus.

use std::process::ExitCode;

use clap::Parser;

use vdiskctl::args::Args;

fn main() -> ExitCode {
    vdiskctl::run(vdiskctl::commands::run(Args::parse()))
}
