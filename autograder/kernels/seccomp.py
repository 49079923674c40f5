"""The system calls that a sandbox refuses: those that make a user namespace, in which its user could mount and be root.

And, where no control group counts it, those that take memory which no process shows as its own.

A filter is a program of the kernel's classic packet filter, on struct seccomp_data (seccomp(2), bpf(4)); bubblewrap
takes one with --seccomp, and a kernel that is forked sets it by itself. It stays, for all that is started later.
"""

import ctypes
import errno
import platform
import struct
from functools import cache

NEW_USER = 0x10000000  # CLONE_NEWUSER of linux/sched.h
# Of linux/audit.h, and the numbers of the calls from asm/unistd.h.
MACHINES = {
    "x86_64": (0xC000003E, {"clone": 56, "unshare": 272, "clone3": 435, "memfd_create": 319, "shmget": 29}),
    "aarch64": (0xC00000B7, {"clone": 220, "unshare": 97, "clone3": 435, "memfd_create": 279, "shmget": 194}),
}
X32 = 0x40000000  # calls of x86_64's other ABI have numbers from here on
NUMBER, MACHINE, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument comes first
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # with an error number in the low half
SET_SECCOMP, FILTER = 22, 2  # of linux/prctl.h and linux/seccomp.h


@cache
def make_program(counted: bool) -> bytes:
    """The filter's instructions; `counted` says whether there is a control group.

    On a machine whose numbers are not known here it refuses nothing.
    """
    machine, calls = MACHINES.get(platform.machine(), (0, None))
    # Each line: instruction, operand, and how many lines to skip if it holds and if it does not.
    lines = (
        [(RETURN, ALLOW, 0, 0)]
        if calls is None
        else [
            (LOAD, MACHINE, 0, 0),
            (EQUAL, machine, 0, 10),
            (LOAD, NUMBER, 0, 0),
            (AT_LEAST, X32, 8, 0),
            (EQUAL, calls["memfd_create"], 0 if counted else 8, 0),
            (EQUAL, calls["shmget"], 0 if counted else 7, 0),
            (
                EQUAL,
                calls["clone3"],
                6,
                0,
            ),  # its flags are in memory, where a filter cannot look; glibc then takes clone
            (EQUAL, calls["clone"], 1, 0),
            (EQUAL, calls["unshare"], 0, 2),
            (LOAD, FIRST_ARGUMENT, 0, 0),
            (ANY_BIT, NEW_USER, 1, 0),
            (RETURN, ALLOW, 0, 0),
            (RETURN, REFUSE | errno.EPERM, 0, 0),
            (RETURN, REFUSE | errno.ENOSYS, 0, 0),
        ]
    )
    return b"".join(struct.pack("=HBBI", code, yes, no, operand) for code, operand, yes, no in lines)


def install(filter: bytes) -> None:
    """For this process and all that it starts. It must have given up the right to gain rights (PR_SET_NO_NEW_PRIVS)."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(SET_SECCOMP, FILTER, ctypes.byref(Program(len(filter) // 8, filter)), 0, 0) < 0:
        raise OSError(ctypes.get_errno(), "no filter of system calls could be set")
