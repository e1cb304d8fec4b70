//! vdiskctl-domain: what vdiskctl(1) runs as `vdiskctl domain`. A program of its own, as it needs libvirt's client library.

fn main() -> std::process::ExitCode {
    vdiskctl_domain::main()
}
