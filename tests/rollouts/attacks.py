"""What a program may try. Each prints THROUGH if it got what it was after, and only then.

Before each stand the names of what it could reach if it ran bare: `CANARY` (a secret file),
`VICTIM` (a file to harm), `DROP` (a path to write to), `PARENT` (the test's process), `PORT` and
`SOCKET` (a TCP port and a unix socket that accept), `ABSTRACT` (the same without a file).
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """
import ctypes, errno, fcntl, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
X86 = os.uname().machine == "x86_64"
def kernel(x86, arm, *arguments):
    result = libc.syscall(x86 if X86 else arm, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result
"""


@dataclass(frozen=True)
class Attack:
    """`bare`: harmless to the machine, so that a run without isolation shows that the attack works.
    `met`: how the run must end, if not as usual."""

    name: str
    program: str
    bare: bool = False
    met: tuple[str, ...] = ("done", "error")

    def text(self, known: dict[str, object]) -> str:
        told = "".join(f"{name} = {value!r}\n" for name, value in known.items())
        return HEAD + told + self.program + "\nprint('THROUGH')\n"


def _files() -> list[Attack]:
    return [
        Attack("read a secret", "assert open(CANARY).read()", True),
        Attack("read the passwords", "assert open('/etc/passwd').read()", True),
        Attack("list a folder", "assert os.listdir(os.path.dirname(CANARY))", True),
        Attack("follow a link", "os.symlink(CANARY, DROP)\nassert open(DROP).read()", True),
        Attack("by way of /proc/self/root", "assert open('/proc/self/root' + CANARY).read()", True),
        Attack("by way of ..", "assert open('/tmp/../' * 5 + CANARY).read()", True),
        Attack("secrets of the environment", "assert os.environ['HF_TOKEN']", True),
        Attack(
            "environment of the parent", "assert open(f'/proc/{PARENT}/environ', 'rb').read()", True
        ),
        Attack(
            "environment of whoever started it",
            "assert open(f'/proc/{os.getppid()}/environ', 'rb').read()",
            True,
        ),
        Attack("own command line", "assert open('/proc/self/cmdline').read()", True),
        Attack("memory of the parent", "open(f'/proc/{PARENT}/mem', 'rb')", True),
        Attack("write a file", "open(DROP, 'w').write('x')", True),
        Attack("append to a file", "open(VICTIM, 'a').write('x')", True),
        Attack("cut a file", "os.truncate(VICTIM, 0)", True),
        Attack("delete a file", "os.remove(VICTIM)", True),
        Attack("rename a file", "os.rename(VICTIM, DROP)", True),
        Attack("change a file's mode", "os.chmod(VICTIM, 0o777)", True),
        Attack("change a file's times", "os.utime(VICTIM, (0, 0))", True),
        Attack("make a folder", "os.mkdir(DROP)", True),
        Attack("make a pipe", "os.mkfifo(DROP)", True),
        Attack(
            "write to shared memory",
            "open('/dev/shm/marlora-attack', 'w').write('x')\nos.remove('/dev/shm/marlora-attack')",
            True,
        ),
        Attack("write over Python itself", "open(os.__file__, 'r+').close()"),
        Attack(
            "files left open",
            "for fd in range(3, 1 << 16):\n    try:\n        os.fstat(fd)\n        break\n    except"
            " OSError:\n        pass\nelse:\n    raise SystemExit",
            True,
        ),
        Attack("packages of the trainer", "import numpy", True),
        Attack(
            "write to /tmp unasked",
            "open('/tmp/marlora-attack', 'w').write('x')\nos.remove('/tmp/marlora-attack')",
            True,
        ),
    ]


def _network() -> list[Attack]:
    raw = "family = {}\nhandle = kernel(41, 198, family, {}, 0)"
    return [
        Attack("connect", "socket.create_connection(('127.0.0.1', PORT), 5)", True),
        Attack(
            "connect through ctypes",
            "handle = libc.socket(2, 1, 0)\nassert handle >= 0\naddress = (2).to_bytes(2,"
            " sys.byteorder) + PORT.to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)\nassert"
            " libc.connect(handle, address, 16) == 0",
            True,
        ),
        Attack("socket by number", raw.format(2, 1), True),
        Attack(
            "UDP",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))",
            True,
        ),
        Attack("listen", "socket.create_server(('127.0.0.1', 0))", True),
        Attack("unix socket", "s = socket.socket(socket.AF_UNIX)\ns.connect(SOCKET)", True),
        Attack(
            "unix socket without a file",
            "s = socket.socket(socket.AF_UNIX)\ns.connect(ABSTRACT)",
            True,
        ),
        Attack("netlink", raw.format(16, 3), True),
        Attack("vsock", raw.format(40, 1)),
        Attack("packets", raw.format(17, 3)),
        Attack("io_uring", "kernel(425, 425, 4, ctypes.create_string_buffer(256))"),
    ]


def _processes() -> list[Attack]:
    return [
        Attack("fork", "if os.fork() == 0:\n    os._exit(0)\nos.wait()", True),
        Attack(
            "fork by number",
            "pid = kernel(57, 220, 17, 0, 0, 0, 0)\nif pid == 0:\n    os._exit(0)\nos.wait()",
            True,
        ),
        Attack("vfork", "os.posix_spawn('/bin/true', ['true'], {})\nos.wait()", True),
        Attack("shell", "assert subprocess.run(['/bin/sh', '-c', 'exit 0']).returncode == 0", True),
        Attack("become a shell", "os.execv('/bin/echo', ['echo', 'THROUGH'])", True),
        Attack(
            "become Python again",
            "os.execv(sys.executable, [sys.executable, '-c', 'print(\"THROUGH\")'])",
            True,
        ),
        Attack(
            "fork bomb",
            "made = 0\nfor _ in range(50):\n    try:\n        if os.fork() == 0:\n           "
            " os._exit(0)\n        made += 1\n    except OSError:\n        pass\nassert made",
            True,
        ),
        Attack("threads", "t = threading.Thread(target=time.sleep, args=(0,))\nt.start()", True),
        Attack("signal to the parent", "os.kill(PARENT, 0)", True),
        Attack("signal to all", "os.kill(-1, 0)", True),
        Attack("signal to whoever started it", "os.kill(os.getppid(), 0)", True),
        Attack("signal by number", "kernel(234, 131, PARENT, PARENT, 0)", True),
        Attack(
            "signal through a descriptor",
            "handle = kernel(434, 434, PARENT, 0)\nkernel(424, 424, handle, 0, None, 0)",
            True,
        ),
        Attack(
            "signal through an owner",
            "r, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, PARENT)",
            True,
        ),
        Attack("trace the parent", "kernel(101, 117, 16, PARENT, 0, 0)"),
        Attack("be traced", "kernel(101, 117, 0, 0, 0, 0)", True),
        Attack(
            "read the parent's memory",
            "buffer = ctypes.create_string_buffer(8)\nclass V(ctypes.Structure):\n    _fields_ ="
            " [('a', ctypes.c_void_p), ('n', ctypes.c_size_t)]\nhere = V(ctypes.addressof(buffer),"
            " 8)\nif libc.process_vm_readv(PARENT, ctypes.byref(here), 1, ctypes.byref(here), 1, 0)"
            " < 0 and ctypes.get_errno() != errno.EFAULT:\n    raise OSError",
            True,
        ),
        Attack("compare with the parent", "kernel(312, 272, PARENT, os.getpid(), 5, 0, 0)"),
        Attack("the parent's limits", "resource.prlimit(PARENT, resource.RLIMIT_NOFILE)", True),
        Attack("the parent's priority", "os.getpriority(os.PRIO_PROCESS, PARENT)", True),
        Attack("own priority", "os.nice(1)", True),
        Attack("own cores", "os.sched_setaffinity(0, os.sched_getaffinity(0))", True),
        Attack(
            "a process group leader by setsid",
            "if os.getpid() != os.getsid(0):\n    os.setsid()\nelse:\n    raise SystemExit",
        ),
        Attack("outlive the parent", "assert libc.prctl(1, 0, 0, 0, 0) == 0", True),
    ]


def _kernel() -> list[Attack]:
    return [
        Attack("namespaces", "kernel(272, 97, 0x10000000)"),
        Attack("a namespace of another", "kernel(308, 268, 0, 0)"),
        Attack("mount", "kernel(165, 40, b'tmpfs', b'/tmp', b'tmpfs', 0, None)"),
        Attack("the new mount", "kernel(430, 430, b'tmpfs', 0)"),
        Attack("change root", "os.chroot('/')", True),
        Attack("clock", "time.clock_settime(time.CLOCK_REALTIME, time.time())"),
        Attack("host name", "socket.sethostname('mine')"),
        Attack("bpf", "kernel(321, 280, 0, ctypes.create_string_buffer(128), 128)"),
        Attack("keys", "kernel(250, 219, 0, -3, 0, 0, 0)"),
        Attack("page faults", "kernel(323, 282, 1)"),
        Attack(
            "performance counters",
            "kernel(298, 241, ctypes.create_string_buffer(128), 0, -1, -1, 0)",
        ),
        Attack("memory without a name", "os.memfd_create('x')", True),
        Attack("shared memory", "assert libc.shmget(0, 4096, 0o1600) >= 0", True),
        Attack("message queues", "assert libc.msgget(0, 0o1600) >= 0", True),
        Attack("watch files", "assert libc.inotify_init() >= 0", True),
        Attack("a weaker filter", "kernel(317, 277, 1, 0, b'\\1\\0\\0\\0\\0\\0\\0\\0')"),
        Attack(
            "calls of another architecture",
            "code = bytes.fromhex('b814000000cd80c3')\nimport mmap\nm = mmap.mmap(-1, 4096,"
            " prot=7)\nm.write(code)\nassert"
            " ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))() > 0",
            False,
            ("killed", "error"),
        ),
        Attack(
            "more memory than allowed", "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", True
        ),
        Attack(
            "more time than allowed",
            "resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
            True,
        ),
        Attack(
            "more files than allowed", "resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))"
        ),
        Attack(
            "capabilities",
            "header = (ctypes.c_uint32 * 2)(0x20080522, 0)\nkernel(126, 91, header,"
            " (ctypes.c_uint32 * 6)(-1, -1, -1, -1, -1, -1))",
        ),
        Attack("another user", "os.setuid(1)"),
    ]


def _limits() -> list[Attack]:
    return [
        Attack("ten gigabytes", "x = bytearray(10 * 2**30)", False, ("memory",)),
        Attack(
            "gigabytes bit by bit",
            "x = []\nwhile len(x) < 10**4:\n    x.append(bytearray(2**20))",
            False,
            ("memory",),
        ),
        Attack(
            "gigabytes in pipes",
            "held = []\ntry:\n    while True:\n        held.append(os.pipe())\nexcept OSError as"
            " error:\n    sys.exit(0 if len(held) < 64 else print('THROUGH'))",
        ),
        Attack("never ending", "while True:\n    pass", False, ("time",)),
        Attack(
            "never ending, deaf to signals",
            "for n in range(1, 32):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n    except"
            " (OSError, ValueError):\n        pass\nwhile True:\n    pass",
            False,
            ("time",),
        ),
        Attack("asleep", "time.sleep(1000)", False, ("time",)),
        Attack("silent and asleep", "os.close(1)\nos.close(2)\ntime.sleep(1000)", False, ("time",)),
        Attack(
            "gigabytes of output", "while True:\n    os.write(1, b'x' * 65536)", False, ("output",)
        ),
        Attack(
            "gigabytes of errors", "while True:\n    os.write(2, b'x' * 65536)", False, ("output",)
        ),
        Attack(
            "a pattern that explodes",
            "import re\nre.match('(a+)+$', 'a' * 40 + 'b')",
            False,
            ("time",),
        ),
        Attack("a crash", "ctypes.string_at(0)", False, ("killed",)),
        Attack(
            "a call too deep",
            "sys.setrecursionlimit(10**9)\ndef f(n):\n    return f(n + 1) + str(n).replace('1',"
            " '2', 1).__len__()\nf(0)",
            False,
            ("killed", "memory", "error", "time"),
        ),
        Attack("the init process's exit code", "os._exit(97)", False, ("error",)),
        Attack("a number too long", "print(10**5000)"),
    ]


PLAIN: tuple[Attack, ...] = (*_files(), *_network(), *_processes(), *_kernel(), *_limits())

# Candidates for the hidden test `assert f(3) == SECRET`. None of them can know what SECRET is.
SECRET = 736_451_907
FORGERIES: dict[str, str] = {
    "an int that equals everything": (
        "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\ndef f(x):"
        " return E(0)"
    ),
    "a str that equals everything": (
        "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = str.__hash__\ndef f(x):"
        " return E('0')"
    ),
    "an object that equals everything": (
        "class E:\n    def __eq__(s, o): return True\ndef f(x): return E()"
    ),
    "an index that changes its mind": (
        "class E(int):\n    def __index__(s): return s.asked\n    asked = 0\ndef f(x): return E(0)"
    ),
    "a list that equals everything": (
        "class E(list):\n    def __eq__(s, o): return True\n    def __iter__(s): return"
        " iter(())\ndef f(x): return E()"
    ),
    "not a number": "def f(x): return float('nan')",
    "exit with 0 at once": "import os\nos._exit(0)",
    "exit with 0 when asked": "import os\ndef f(x): os._exit(0)",
    "SystemExit": "import sys\ndef f(x): sys.exit(0)",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "AssertionError": "def f(x): raise AssertionError",
    "StopIteration": "def f(x): raise StopIteration",
    "an exception that lies": (
        "class AssertionError(Exception):\n    __name__ = 'ok'\ndef f(x): raise AssertionError(['',"
        " 'passed'])"
    ),
    "asserts switched off": (
        "import builtins\nbuiltins.AssertionError = type(None)\n__debug__ and None\ndef f(x):"
        " return 0"
    ),
    "builtins replaced": (
        "import builtins\nfor n in ('int', 'str', 'isinstance', 'compile', 'exec', 'type',"
        " 'list'):\n    setattr(builtins, n, lambda *a, **k: True)\ndef f(x): return 0"
    ),
    "frames": (
        "import sys, re\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        m ="
        " re.search(r'f\\(3\\) == (\\d+)', repr(frame.f_locals) + repr(frame.f_globals))\n       "
        " if m: return int(m[1])\n        frame = frame.f_back"
    ),
    "the garbage collector": (
        "import gc, re\ndef f(x):\n    for o in gc.get_objects():\n        m = re.search(r'f\\(3\\)"
        " == (\\d+)', repr(o)[:10000])\n        if m: return int(m[1])"
    ),
    "the command line": (
        "import sys, re\ndef f(x):\n    m = re.search(r'f\\(3\\) == (\\d+)', repr(sys.orig_argv) +"
        " repr(sys.argv))\n    return int(m[1])"
    ),
    "descriptors read": (
        "import os, re, select\ndef f(x):\n    for fd in range(64):\n        try:\n           "
        " os.lseek(fd, 0, 0)\n        except OSError: pass\n        try:\n            if"
        " select.select([fd], [], [], 0)[0]:\n                m = re.search(rb'f\\(3\\) == (\\d+)',"
        " os.read(fd, 65536))\n                if m: return int(m[1])\n        except (OSError,"
        " ValueError): pass"
    ),
    "a verdict to every descriptor": (
        'import os\ndef f(x):\n    for fd in range(64):\n        try: os.write(fd, b\'["",'
        ' ""]\\n["nonce", ""]\\n\')\n        except OSError: pass\n    return 0'
    ),
    "verdicts at the start": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'[\"value\", true]\\n' * 5)\n   "
        " except OSError: pass\ndef f(x): return 0"
    ),
    "an answer of no known kind": (
        "import sys\nm = sys.modules['__main__']\nm.pack = lambda v, depth=0: ['eval', '1']\ndef"
        " f(x): return 0"
    ),
    "the init process's functions": (
        "import sys\nm = sys.modules['__main__']\nm.write_line = lambda h, d:"
        ' __import__(\'os\').write(h, b\'["value", ["int", "0x0"], ["", ""]]\\n\')\ndef f(x):'
        " return 0"
    ),
    "hidden tests in files": (
        "import os, re\ndef f(x):\n    for top in ('/tmp', '/proc', '/', '/dev/fd',"
        " '/proc/self/fd'):\n        for at, _, names in os.walk(top):\n            if len(at) >"
        " 60: continue\n            for n in names[:20]:\n                try: m ="
        " re.search(rb'f\\(3\\) == (\\d+)', open(os.path.join(at, n), 'rb').read(10000))\n         "
        "       except OSError: continue\n                if m: return int(m[1])"
    ),
    "the checker's memory": (
        "import os\ndef f(x):\n    for pid in range(1, 50):\n        try: open(f'/proc/{pid}/mem',"
        " 'rb')\n        except OSError: pass\n    return 0"
    ),
    "the checker killed": (
        "import os, signal\ndef f(x):\n    for pid in (os.getppid(), os.getpid() + 1, os.getpid() +"
        " 2):\n        try: os.kill(pid, signal.SIGKILL)\n        except OSError: pass\n   "
        " return 0"
    ),
    "all descriptors closed": "import os\ndef f(x):\n    os.closerange(0, 64)\n    return 0",
    "never an answer": "def f(x):\n    while True: pass",
    "an answer of gigabytes": "def f(x): return 'x' * (2 << 20)",
    "an answer without end": (
        "import os, sys\ndef f(x):\n    while True:\n        for fd in range(3, 10):\n           "
        " try: os.write(fd, b'x' * 65536)\n            except OSError: pass"
    ),
    "nested without end": "def f(x):\n    a = []\n    for _ in range(1000): a = [a]\n    return a",
    "said to be right": "def f(x):\n    print('OK passed 1.0')\n    return True",
    "the test's name": "def check(*a): return True\ndef f(x): return None",
    "a coroutine": "async def f(x): return 0",
    "at exit": (
        "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): raise SystemExit(0)"
    ),
    "no such function": "def g(x): return 0",
    "no program": "def f(x: return 0",
}

# Programs in Monty: (program, how it ends). `ask` is the only external.
WORKFLOWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "files": ("open(CANARY).read()", ("error",)),
    "pathlib": ("from pathlib import Path\nPath(CANARY).read_text()", ("error",)),
    "write": ("open(DROP, 'w').write('x')", ("error",)),
    "environment": ("import os\nos.environ['HF_TOKEN']", ("error",)),
    "getenv": ("import os\nassert os.getenv('HF_TOKEN') is not None", ("error",)),
    "shell": ("import os\nos.system('true')", ("error",)),
    "subprocess": ("import subprocess", ("error",)),
    "socket": ("import socket", ("error",)),
    "ctypes": ("import ctypes", ("error",)),
    "import by name": ("__import__('os').listdir('/')", ("error", "syntax")),
    "classes": ("().__class__.__base__.__subclasses__()", ("error",)),
    "globals of a function": ("def f(): pass\nf.__globals__", ("error",)),
    "globals of an external": ("ask.__globals__", ("error",)),
    "inside of an external": ("ask.__code__", ("error",)),
    "an external of another name": ("await answer()", ("error",)),
    "a private external": ("await __import_answer__()", ("error",)),
    "never ending": ("while True:\n    pass", ("time",)),
    "never ending comprehension": ("[0 for _ in range(10**12)]", ("time", "memory")),
    "memory": ("x = [0] * 10**9", ("memory",)),
    "a long text": ("x = 'x' * 10**10", ("memory", "error")),
    "a large number": ("x = 10 ** 10 ** 10", ("memory", "error", "time")),
    "doubling": ("x = 'x'\nwhile True:\n    x += x", ("memory", "time")),
    "recursion": ("def f():\n    return f()\nf()", ("error", "memory")),
    "nesting": ("x = []\nfor _ in range(10**5):\n    x = [x]\nx", ("error", "memory", "killed")),
    "source too deep": ("(" * 5000 + ")" * 5000, ("syntax", "error", "killed")),
    "output": ("while True:\n    print('x' * 1000)", ("output",)),
    "a flood of calls": ("while True:\n    await ask('x')", ("calls",)),
    "a flood at once": (
        "import asyncio\nawait asyncio.gather(*[ask('x') for _ in range(10**4)])",
        ("calls",),
    ),
    "calls never awaited": ("while True:\n    ask('x')", ("calls",)),
    "wrong arguments": ("await ask(1, 2, 3, 4, 5, evil=6)", ("error",)),
    "a function as the value": ("lambda: 1", ("done",)),  # a text that names it
    "an object as the value": ("class A:\n    pass\nA()", ("error",)),
    "a pattern that explodes": (
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b') and 1",
        ("done", "time", "error"),
    ),
    "sleep": ("import time\ntime.sleep(10**6)\n1", ("done", "error")),
    "a number with a million digits": ("str(7 ** 10**6)", ("error", "memory", "time", "done")),
}
