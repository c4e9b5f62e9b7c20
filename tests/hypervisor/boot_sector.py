"""The built-in disk: a boot sector, 16-bit real mode code, that tries the disk it came from.

    python tests/hypervisor/boot_sector.py > IMAGE

It greets over the serial port, reads the second sector through the BIOS, adds its words up (they
make 0), prints the line that it begins with, inverts it, and writes that as the third. Then it ends
QEMU, which takes `-device isa-debug-exit,iobase=0xf4`.
"""

import sys
from struct import Struct

SECTOR = 512
DISK_SIZE = 1 << 20  # the BIOS wants one cylinder at least, of 16 * 63 sectors
WORDS = Struct("<256H")
PASSED, FAILED = 0x21, 0x23  # QEMU's exit status: 2 * n + 1, where n is what the guest has said

_LISTING = """
    31 c0               ; start:  xor   ax, ax
    8e d8               ;         mov   ds, ax
    8e c0               ;         mov   es, ax
    8e d0               ;         mov   ss, ax
    bc 00 7c            ;         mov   sp, start           the stack ends where this code begins
    fc                  ;         cld
    89 d5               ;         mov   bp, dx              dl: the drive that we come from
    be 80 7c            ;         mov   si, hello
    e8 59 00            ;         call  print

    b8 01 02            ;         mov   ax, 0x0201          read one sector
    b9 02 00            ;         mov   cx, 2               the second: the BIOS counts from 1
    e8 46 00            ;         call  disk
    72 37               ;         jc    failed
    31 db               ;         xor   bx, bx
    be 00 80            ;         mov   si, buffer
    b9 00 01            ;         mov   cx, 256
    ad                  ; sum:    lodsw
    01 c3               ;         add   bx, ax
    e2 fb               ;         loop  sum
    85 db               ;         test  bx, bx
    75 26               ;         jnz   failed
    be 00 80            ;         mov   si, buffer
    e8 37 00            ;         call  print

    be 00 80            ;         mov   si, buffer
    b9 00 01            ;         mov   cx, 256
    f7 14               ; invert: not   word [si]
    ad                  ;         lodsw                     si += 2
    e2 fb               ;         loop  invert
    b8 01 03            ;         mov   ax, 0x0301          write one sector
    b9 03 00            ;         mov   cx, 3               the third
    e8 19 00            ;         call  disk
    72 0a               ;         jc    failed
    be b0 7c            ;         mov   si, done
    e8 1b 00            ;         call  print
    b0 10               ;         mov   al, PASSED >> 1
    eb 08               ;         jmp   end

    be e0 7c            ; failed: mov   si, wrong
    e8 11 00            ;         call  print
    b0 11               ;         mov   al, FAILED >> 1
    e6 f4               ; end:    out   0xf4, al            isa-debug-exit
    f4                  ;         hlt
    eb fb               ;         jmp   end

    89 ea               ; disk:   mov   dx, bp              what ax and cx say
    b6 00               ;         mov   dh, 0               head 0
    bb 00 80            ;         mov   bx, buffer          at 0x8000
    cd 13               ;         int   0x13                carry: it failed
    c3                  ;         ret

    ba fd 03            ; print:  mov   dx, 0x3fd           the line at si, with its newline
    ec                  ; busy:   in    al, dx
    a8 20               ;         test  al, 0x20            transmitter empty?
    74 fb               ;         jz    busy
    b2 f8               ;         mov   dl, 0xf8
    ac                  ;         lodsb
    ee                  ;         out   dx, al
    3c 0a               ;         cmp   al, 10
    75 f0               ;         jne   print
    c3                  ;         ret
"""

CODE = (
    bytes.fromhex("".join(line.partition(";")[0] for line in _LISTING.splitlines())).ljust(0x80)
    + b"first    hello from the boot sector\n".ljust(0x30)  # hello, at 0x7c80
    + b"third    inverted and written\n".ljust(0x30)  # done, at 0x7cb0
    + b"failed   the BIOS or the checksum\n"  # wrong, at 0x7ce0
)
TEXT = b"second   read through the BIOS, its sum is 0\n"


def image() -> bytes:
    """Return the disk: three sectors that are used, of which the guest writes the last one."""
    second = TEXT.ljust(SECTOR - 2) + bytes(2)
    total: int = sum(WORDS.unpack(second))
    second = second[:-2] + (-total & 0xFFFF).to_bytes(2, "little")
    return (CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa" + second).ljust(DISK_SIZE, b"\0")


if __name__ == "__main__":
    sys.stdout.buffer.write(image())
