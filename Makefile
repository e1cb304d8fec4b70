# make demo     set up, build, boot a guest on a disk that vdiskd serves, show the graph
# make test     set up, build, check style and licences, run all tests (guests included)
# make bench    set up, build for speed, compare with the newest qemu-storage-daemon
# make bench-live   the same for what guests notice of changes under them
# make bench-jobs   the same for backups, mirrors, commits and streams
# make bench-service   calls over D-Bus, starts, and what guests notice of restarts
# make avocado  the long tests: hundreds of kills, restarts and operations (OTHER=build: two versions in turns)
# make install  install what 'make release' built (DESTDIR, PREFIX, …)
# make install-selinux   build the policy module and install it (needs selinux-policy-devel, or selinux-policy-dev)
#
# All of them can be run again; what is there already is left alone. Downloads go to $VDISK_LAB, or to
# ~/.cache/vdisk. No package source of the machine is changed.

PREFIX = /usr
BINDIR = $(PREFIX)/bin
LIBEXECDIR = $(PREFIX)/libexec
MANDIR = $(PREFIX)/share/man
UNITDIR = $(PREFIX)/lib/systemd/system
DBUSDIR = $(PREFIX)/share/dbus-1
HOOKDIR = /etc/libvirt/hooks/qemu.d
SELINUXDIR = $(PREFIX)/share/selinux
USERUNITDIR = $(PREFIX)/lib/systemd/user
TMPFILESDIR = $(PREFIX)/lib/tmpfiles.d
SYSUSERSDIR = $(PREFIX)/lib/sysusers.d
PROGRAMS = target/release
CARGO = cargo
RUST_MIN = 1.89

SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
export PATH := $(HOME)/.cargo/bin:$(PATH)
export VDISK_LAB ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/vdisk
# (make before 4.4 does not give its exported variables to $$(shell).)
HOST = $(shell PATH="$(PATH)" rustc -vV | sed -n 's/^host: //p')
GUEST = target/guest/$(HOST)/release/init

.PHONY: setup packages rust tools guest lab demo build release test lint unit bench bench-live bench-jobs bench-service avocado install install-selinux clean

setup: packages rust guest

packages:
	@qemu-tests/packages.sh "$(SUDO)"

rust:
	@command -v cargo >/dev/null || { \
	    echo "== Rust toolchain (rustup)"; \
	    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt; }
	@command -v cargo >/dev/null || { \
	    echo "Rust is not here, and rustup could not install it: install Rust $(RUST_MIN) or newer, and run this again"; exit 1; }
	@cargo --version | awk '{split($$2,v,"."); split("$(RUST_MIN)",w,"."); exit !(v[1]>w[1] || (v[1]==w[1] && v[2]>=w[2]))}' \
	    || { echo "Rust $(RUST_MIN) or newer is needed, here is $$(cargo --version): run 'rustup update'"; exit 1; }

tools: rust
	@command -v cargo-nextest >/dev/null || $(CARGO) install --locked cargo-nextest
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny

guest: packages rust
	@qemu-tests/lab.sh kernel
	@RUSTFLAGS='-C target-feature=+crt-static' $(CARGO) build -q --locked -p vdisk-guest --release \
	    --target $(HOST) --target-dir target/guest
	@qemu-tests/lab.sh initramfs $(GUEST)

lab: packages
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh trixie
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh sid

demo: setup release
	@target/release/vdisk-demo

build: rust
	$(CARGO) build --locked --workspace

release: rust
	$(CARGO) build --locked --release --workspace

lint: tools
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- -D warnings
	$(CARGO) deny --log-level error check bans licenses sources

test: setup tools build
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh trixie
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh libvirt
	@$(MAKE) --no-print-directory lint
	$(CARGO) nextest run --locked --workspace --no-fail-fast

avocado: setup release
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh libvirt
	@[ -x target/avocado/bin/avocado ] || { python3 -m venv target/avocado && target/avocado/bin/pip install -q avocado-framework; }
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) OTHER=$(OTHER) target/avocado/bin/avocado run --max-parallel-tasks=1 avocado/long.py

bench: setup lab release
	@target/release/vdisk-bench $(BENCH)

bench-live: setup lab release
	@target/release/vdisk-bench-live

bench-jobs: setup lab release
	@target/release/vdisk-bench-jobs $(BENCH)

bench-service: setup release
	@$(SUDO) env VDISK_LAB=$(VDISK_LAB) qemu-tests/lab.sh libvirt
	@target/release/vdisk-bench-service
	@for busy in 1 8; do \
	    $(SUDO) env ROUNDS=20 BUSY=$$busy VDISK_LAB=$(VDISK_LAB) qemu-tests/in-systemd.sh target/release \
	        qemu-tests/tests/systemd/restart.sh | grep 'busy:.* longest wait'; \
	    echo "with systemd of Debian 13:"; \
	    $(SUDO) env ROUNDS=20 BUSY=$$busy LOWER=$(VDISK_LAB)/libvirt VDISK_LAB=$(VDISK_LAB) qemu-tests/in-systemd.sh target/release \
	        qemu-tests/tests/systemd/handover.sh | grep -E '^(none|restart|reload),.* longest wait'; done

install:
	install -D -m 755 $(PROGRAMS)/vdiskd $(DESTDIR)$(LIBEXECDIR)/vdiskd
	install -D -m 755 $(PROGRAMS)/vdiskctl $(DESTDIR)$(BINDIR)/vdiskctl
	install -D -m 755 $(PROGRAMS)/vdiskctl-domain $(DESTDIR)$(BINDIR)/vdiskctl-domain
	install -D -m 755 $(PROGRAMS)/vdisk-libvirt-hook $(DESTDIR)$(LIBEXECDIR)/vdisk-libvirt-hook
	install -D -m 755 $(PROGRAMS)/vdiskd-libvirt $(DESTDIR)$(LIBEXECDIR)/vdiskd-libvirt
	install -d $(DESTDIR)$(HOOKDIR)
	ln -sf $(LIBEXECDIR)/vdisk-libvirt-hook $(DESTDIR)$(HOOKDIR)/vdiskd
	install -d $(DESTDIR)$(MANDIR)/man1 $(DESTDIR)$(MANDIR)/man8
	install -D -m 644 docs/vdiskd.toml.5 $(DESTDIR)$(MANDIR)/man5/vdiskd.toml.5
	$(PROGRAMS)/vdiskctl man >$(DESTDIR)$(MANDIR)/man1/vdiskctl.1
	$(PROGRAMS)/vdiskctl-domain man >$(DESTDIR)$(MANDIR)/man1/vdiskctl-domain.1
	install -D -m 644 docs/libvirt-domain.rng $(DESTDIR)$(PREFIX)/share/vdiskd/libvirt-domain.rng
	$(PROGRAMS)/vdisk-dbus-man >$(DESTDIR)$(MANDIR)/man5/org.vdisk1.5
	$(PROGRAMS)/vdiskd --man >$(DESTDIR)$(MANDIR)/man8/vdiskd.8
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	install -d $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	install -d $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(PROGRAMS)/vdiskctl completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/vdiskctl
	$(PROGRAMS)/vdiskctl completion zsh >$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_vdiskctl
	$(PROGRAMS)/vdiskctl completion fish >$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/vdiskctl.fish
	install -D -m 644 systemd/vdiskd.service $(DESTDIR)$(UNITDIR)/vdiskd.service
	sed -i 's|@libexecdir@|$(LIBEXECDIR)|' $(DESTDIR)$(UNITDIR)/vdiskd.service
	sed -e 's|^\(ExecStart=.*\)|\1 --instance %i|' -e 's|^BusName=.*|&.instance.%i|' \
	    -e 's/^\(Runtime\|State\)Directory=.*/&-%i/' -e 's|^Description=.*|&, instance %i|' \
	    $(DESTDIR)$(UNITDIR)/vdiskd.service >$(DESTDIR)$(UNITDIR)/vdiskd@.service
	install -m 644 systemd/vdiskd-libvirt.service $(DESTDIR)$(UNITDIR)/vdiskd-libvirt.service
	sed -i 's|@libexecdir@|$(LIBEXECDIR)|' $(DESTDIR)$(UNITDIR)/vdiskd-libvirt.service
	install -m 644 systemd/vdiskd-export@.socket systemd/vdiskd-metrics.socket $(DESTDIR)$(UNITDIR)/
	install -D -m 644 systemd/user/vdiskd.service $(DESTDIR)$(USERUNITDIR)/vdiskd.service
	sed -i 's|@libexecdir@|$(LIBEXECDIR)|' $(DESTDIR)$(USERUNITDIR)/vdiskd.service
	install -D -m 644 systemd/user/org.vdisk1.service $(DESTDIR)$(DBUSDIR)/services/org.vdisk1.service
	install -D -m 644 systemd/vdiskd.tmpfiles $(DESTDIR)$(TMPFILESDIR)/vdiskd.conf
	install -D -m 644 systemd/vdiskd.sysusers $(DESTDIR)$(SYSUSERSDIR)/vdiskd.conf
	install -D -m 644 systemd/org.vdisk1.conf $(DESTDIR)$(DBUSDIR)/system.d/org.vdisk1.conf
	install -D -m 644 systemd/org.vdisk1.policy $(DESTDIR)$(PREFIX)/share/polkit-1/actions/org.vdisk1.policy
	install -D -m 644 systemd/org.vdisk1.service $(DESTDIR)$(DBUSDIR)/system-services/org.vdisk1.service
	install -m 644 systemd/org.vdisk1.Domains.service $(DESTDIR)$(DBUSDIR)/system-services/org.vdisk1.Domains.service
	install -d $(DESTDIR)$(DBUSDIR)/interfaces
	install -m 644 dbus-interfaces/*.xml $(DESTDIR)$(DBUSDIR)/interfaces/

# A module of the folder that is built in, so that nothing is written among the sources.
SELINUX_BUILD = target/selinux
install-selinux:
	install -d $(SELINUX_BUILD)
	cp selinux/vdiskd.te selinux/vdiskd.if $(SELINUX_BUILD)/
	sed 's|^/usr/libexec|$(LIBEXECDIR)|' selinux/vdiskd.fc >$(SELINUX_BUILD)/vdiskd.fc
	$(MAKE) -C $(SELINUX_BUILD) -f /usr/share/selinux/devel/Makefile vdiskd.pp
	install -D -m 644 $(SELINUX_BUILD)/vdiskd.pp $(DESTDIR)$(SELINUXDIR)/packages/vdiskd.pp
	install -D -m 644 selinux/vdiskd.if $(DESTDIR)$(SELINUXDIR)/devel/include/distributed/vdiskd.if
	@[ -n "$(DESTDIR)" ] || echo "== load it with: semodule -i $(SELINUXDIR)/packages/vdiskd.pp, and label what is installed: restorecon -Ri $(LIBEXECDIR) $(UNITDIR) /etc/vdiskd /run /var/lib/vdiskd*"

clean:
	$(CARGO) clean
