//! What vdiskctl is made of, for vdiskctl(1) itself and for vdiskctl-domain(1).

pub mod args;
pub mod bitmaps;
pub mod commands;
pub mod daemon;
pub mod error;
pub mod fleece;
pub mod images;
pub mod jobs;
pub mod objects;
pub mod options;
pub mod output;
pub mod secrets;
pub mod stats;
pub mod status;
pub mod throttle;
pub mod top;
pub mod tree;

use std::process::ExitCode;

/// Runs a command line to its end; an error is one line on standard error.
pub fn run(command: impl Future<Output = error::Result<()>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(command),
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
