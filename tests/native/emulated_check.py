"""A runner of tests/native/cross_check.sh: the native check of AVX-512 on an emulated CPU, for machines whose own has none.

Bochs emulates a PC, and Debian's kernel boots into the check. The exit status is the check's, 1 if that does not end, and 0, with a line
that says so, where the PC does not come as far. Debian's bochs, bochsbios, vgabios, bochs-term, grub-pc-bin, grub-common, xorriso, mtools,
busybox-static and cpio are wanted.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

SECONDS = 1500  # it takes some 400
STATUS = re.compile(r"status (\d+)\.")
INIT = """#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox grep -q avx512bw /proc/cpuinfo || /bin/busybox poweroff -f
/bin/busybox grep -m 1 'model name' /proc/cpuinfo
/bin/check scalar avx512
echo "status $?."
/bin/busybox sleep 1  # the serial line is slower than the power switch
/bin/busybox poweroff -f
"""
# Bochs 2.7 lays XSAVE's compact form out as no kernel expects it: without it (features 321 and 323).
GRUB = """serial --unit=0 --speed=115200
terminal_output serial
linux /boot/vmlinuz console=ttyS0 quiet mitigations=off nokaslr lpj=1000000 tsc=reliable noxsaves clearcpuid=321,323
initrd /boot/initrd
boot
"""
BOCHS = """display_library: term
cpu: model=corei7_skylake_x, ips=50000000
memory: guest=512, host=512
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
boot: cdrom
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=cdrom, path=boot.iso, status=inserted
com1: enabled=1, mode=file, dev=serial.txt
clock: sync=none
log: bochs.log
panic: action=fatal
"""


def run(*words: str, cwd: Path, **more: object) -> str:
    return subprocess.run(words, cwd=cwd, check=True, stdout=subprocess.PIPE, text=True, **more).stdout  # type: ignore[call-overload]


def fetch_kernel(folder: Path) -> Path:
    (package,) = re.findall(r"Depends: (linux-image-\S+)", run("apt-cache", "depends", "linux-image-cloud-amd64", cwd=folder))
    run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=folder)
    (archive,) = folder.glob("*.deb")
    run("dpkg-deb", "-x", archive.name, "kernel", cwd=folder)
    (kernel,) = folder.glob("kernel/boot/vmlinuz-*")
    return kernel


def make_disk(folder: Path, binary: Path) -> None:
    root = folder / "root"
    for name in ("bin", "proc", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    shutil.copy(binary, root / "bin" / "check")
    for library in re.findall(r"(/\S+) \(", run("ldd", str(binary), cwd=folder)):
        (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, root / library[1:])
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    boot = folder / "disk" / "boot"
    (boot / "grub").mkdir(parents=True)
    shutil.copy(fetch_kernel(folder), boot / "vmlinuz")
    (boot / "grub" / "grub.cfg").write_text(GRUB)
    run("sh", "-c", "find . | cpio -o -H newc --quiet | gzip -1 > ../disk/boot/initrd", cwd=root)
    run("grub-mkrescue", "-o", "boot.iso", "disk", cwd=folder, stderr=subprocess.DEVNULL)
    (folder / "bochsrc").write_text(BOCHS)


def drain(path: str) -> None:
    """Bochs waits for a reader of its screen."""
    with open(path, "rb", buffering=0) as screen:
        try:
            while screen.read(4096):
                pass
        except OSError:  # Bochs has ended
            pass


def emulate(folder: Path) -> str:
    """What came over the serial line until the check had ended."""
    serial = folder / "serial.txt"
    words, pipe = ["bochs-bin", "-q", "-f", "bochsrc"], subprocess.PIPE
    with subprocess.Popen(words, cwd=folder, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as bochs:
        assert bochs.stdin is not None
        assert bochs.stdout is not None
        try:
            bochs.stdin.write("continue\n")  # Debian's Bochs begins in its debugger
            bochs.stdin.flush()
            for line in bochs.stdout:
                if screen := re.search(r'connected to screen "(.+)"', line):
                    threading.Thread(target=drain, args=(screen[1],), daemon=True).start()
                    break
            bochs.wait(SECONDS)  # it ends as the PC is switched off
        except subprocess.TimeoutExpired:
            bochs.kill()
    return serial.read_text(errors="replace") if serial.exists() else ""


def main(binary: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        try:
            make_disk(Path(name), Path(binary))
            printed = emulate(Path(name))
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            printed = f"{error}\n"
    begin, status = printed.find("model name"), STATUS.search(printed)
    if begin < 0:
        print(f"{printed}no PC could be emulated here: the check is left out")
        return 0
    print(printed[begin:])
    return int(status[1]) if status else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
