"""The built-in guest: 16-bit real mode code, and where it puts things in memory.

It greets over the serial port, computes F(47), fills 64 KiB with it, and counts until the host
stores a word. Then it looks at the 64 KiB again, says what it found, and halts.
"""

import ctypes

MAILBOX = 0x1000
RESULT = 0x2000
ENTRY = 0x7C00
FILLED, FILLED_SIZE = 0x10000, 0x10000  # whole pages, whatever the host's page size

FIBONACCI_INDEX = 47  # the last Fibonacci number that fits 32 bits


class Mailbox(ctypes.LittleEndianStructure):
    """What one side changes while the other looks."""

    _fields_ = (
        ("counter", ctypes.c_uint32),  # the guest increments it for as long as
        ("word", ctypes.c_uint32),  # the host has left this at 0
    )


class Result(ctypes.LittleEndianStructure):
    """What the guest has to say."""

    _fields_ = (
        ("fibonacci", ctypes.c_uint32),
        ("seen_before", ctypes.c_uint32),  # all dwords of the 64 KiB, or-ed
        ("word", ctypes.c_uint32),  # as the guest read it from the mailbox
        ("seen_after", ctypes.c_uint32),  # the 64 KiB again, after the word has come
    )


_LISTING = """
    be 80 7c            ; start:  mov   si, hello
    e8 62 00            ;         call  print
    66 31 c0            ;         xor   eax, eax            F(0)
    66 31 db            ;         xor   ebx, ebx
    43                  ;         inc   bx                  F(1)
    b9 2f 00            ;         mov   cx, 47
    66 93               ; next:   xchg  eax, ebx            eax, ebx = ebx, eax + ebx
    66 01 c3            ;         add   ebx, eax
    e2 f9               ;         loop  next
    66 a3 00 20         ;         mov   [RESULT.fibonacci], eax

    ba 00 10            ;         mov   dx, FILLED >> 4
    8e c2               ;         mov   es, dx
    31 ff               ;         xor   di, di
    b9 00 40            ;         mov   cx, FILLED_SIZE / 4
    66 f3 ab            ;         rep   stosd
    e8 2e 00            ;         call  look
    66 89 16 04 20      ;         mov   [RESULT.seen_before], edx

    66 ff 06 00 10      ; spin:   inc   dword [MAILBOX.counter]
    66 a1 04 10         ;         mov   eax, [MAILBOX.word]
    66 85 c0            ;         test  eax, eax
    74 f2               ;         jz    spin
    66 a3 08 20         ;         mov   [RESULT.word], eax
    e8 14 00            ;         call  look
    66 89 16 0c 20      ;         mov   [RESULT.seen_after], edx

    be b0 7c            ;         mov   si, zeros
    66 85 d2            ;         test  edx, edx
    74 03               ;         jz    done
    be e0 7c            ;         mov   si, data
    e8 10 00            ; done:   call  print
    f4                  ;         hlt

    66 31 d2            ; look:   xor   edx, edx            edx = or of the segment's dwords
    31 ff               ;         xor   di, di
    26 66 0b 15         ; more:   or    edx, es:[di]
    83 c7 04            ;         add   di, 4
    75 f7               ;         jnz   more                until di wraps at 64 KiB
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
    + b"guest    hello from 16-bit real mode\n".ljust(0x30)  # hello, at 0x7c80
    + b"guest    got it, and my 64 KiB are zeros now\n".ljust(0x30)  # zeros, at 0x7cb0
    + b"guest    got it, but my 64 KiB still hold data\n"  # data, at 0x7ce0
)
