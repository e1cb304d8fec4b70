//! vdiskctl: the command line client of vdiskd. Everything it does goes over D-Bus.

mod args;
mod bitmaps;
mod commands;
mod daemon;
mod error;
mod fleece;
mod images;
mod jobs;
mod objects;
mod options;
mod output;
mod secrets;
mod stats;
mod status;
mod throttle;
mod top;
mod tree;

use std::process::ExitCode;

use clap::Parser;

use args::Args;

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(commands::run(args)),
        Err(e) => Err(error::Error::failed(e.to_string())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let style = anstyle::AnsiColor::Red.on_default().bold();
            anstream::eprintln!("{style}error:{style:#} {e}");
            ExitCode::from(e.exit_code())
        }
    }
}
