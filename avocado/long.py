"""What takes too long for each commit: the container scripts of qemu-tests with many more rounds (`make avocado`)."""

import os
import subprocess

from avocado import Test

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Containers(Test):
    """Scripts under a real systemd, with the installed unit and its unprivileged user."""

    timeout = 7200

    def in_container(self, script, rounds, lower=None, **more):
        lab = os.environ.get("VDISK_LAB", os.path.expanduser("~/.cache/vdisk"))
        env = {**os.environ, "VDISK_LAB": lab, "ROUNDS": str(rounds), **more}
        if lower:
            env["LOWER"] = os.path.join(lab, lower)
        programs = self.params.get("programs", default=os.path.join(HERE, "target", "release"))
        command = [
            os.path.join(HERE, "qemu-tests", "in-systemd.sh"),
            programs,
            os.path.join(HERE, "qemu-tests", "tests", script),
        ]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        self.log.info(done.stdout)
        self.log.info(done.stderr)
        self.assertEqual(done.returncode, 0)
        self.assertTrue(done.stdout.rstrip().endswith("all is well"))

    def test_guest_over_kills_and_restarts(self):
        """A hundred kills, a hundred restarts and a hundred reloads under one guest that verifies its data."""
        self.in_container("systemd/guest.sh", 300)

    def test_guest_over_two_versions(self):
        """The same with two builds that take turns: OTHER is the other vdiskd."""
        other = os.environ.get("OTHER")
        if not other:
            self.cancel("set OTHER to another build of vdiskd")
        self.in_container("systemd/guest.sh", 60, OTHER=other)

    def test_operations_in_any_order(self):
        """Three hundred operations on two domains of libvirt."""
        self.in_container("libvirt/random.sh", 300, lower="libvirt")
