"""The init process of an isolated process: the first program inside. It gives up every right, then
runs its role; `isolation` starts it.

    python -I -S -B init.py JOB

JOB is JSON: limits, filter, readable paths (see `Isolation.command`); the program is read from the
file descriptor `text`. Standard library only and no import of marlora, which cannot be read inside.

Once the filter is on, this process cannot fork, open a socket, send a signal or read a file other
than Python's own. Roles: `python` runs a program, `candidate` answers calls of a program's
functions, `checker` runs tests that make these calls, `exec` becomes another executable. `scorer`
may fork, and nothing else: it runs the text of `scorer.py`, and each child that reads a model's
answer gives that right up first.
"""

from __future__ import annotations

import builtins
import ctypes
import json
import os
import resource
import sys

TYPING = False
if TYPING:  # importing it takes ten milliseconds of every program's time
    from typing import Any

    Job = dict[str, Any]

MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 22, 24, 38, 47
CAPSET = {"x86_64": 126, "aarch64": 91}
# Landlock: the same numbers on every architecture
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ, LIST = 0b1101, 0b1000  # execute, read file, read folder
# All that Landlock can refuse, by version of its interface: 13 rights of files, then refer,
# truncate, ioctl of devices.
FILE_RIGHTS = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}
MAX_LINE = 1 << 20  # bytes of one call or answer between checker and candidate
FILES = 256  # in /tmp
BAD_JOB, NO_PROGRAM = 97, 98  # exit codes

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    """The result of a system call; raises its `OSError`."""
    if result < 0:
        raise OSError(ctypes.get_errno(), what + ": " + os.strerror(ctypes.get_errno()))
    return result


def limit(job: Job) -> None:
    """Hard limits: raising one again takes a right that is given up next."""
    for kind, value in (
        (resource.RLIMIT_AS, job["memory"]),
        (resource.RLIMIT_FSIZE, job["scratch"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    # a signal, a second later the end
    resource.setrlimit(resource.RLIMIT_CPU, (job["cpu_seconds"], job["cpu_seconds"] + 1))


def scratch(size: int) -> None:
    """Mount a /tmp of `size` bytes and `FILES` files (an empty file takes memory too, and
    bubblewrap cannot bound their number)."""
    options = f"size={size},nr_inodes={FILES},mode=0700".encode()
    checked(
        libc.mount(
            b"tmpfs", b"/tmp", b"tmpfs", ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC), options
        ),
        "mount /tmp",
    )
    os.chdir("/tmp")


def drop_capabilities() -> None:
    """Give up all capabilities, also those that an executable could give back."""
    for number in range(64):
        # refused to a process without capabilities, which then has nothing to give up
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    libc.prctl(PR_CAP_AMBIENT, 4, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    checked(libc.syscall(CAPSET[os.uname().machine], header, none), "capset")


def landlock(paths: list[str], listed: list[str]) -> None:
    """Restrict this process by Landlock: only files below `paths` can be read, none written; no
    TCP, no signal or abstract socket to the outside.

    Below `listed` the names of files can be read, not their contents.
    """
    abi = checked(libc.syscall(CREATE_RULESET, None, 0, 1), "landlock")
    files = FILE_RIGHTS[min(abi, 5)]
    # struct landlock_ruleset_attr: access_fs, access_net (from 4 on), scoped (from 6 on)
    attr = (ctypes.c_uint64 * 3)(files, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = checked(
        libc.syscall(CREATE_RULESET, attr, 8 * (1 + (abi >= 4) + (abi >= 6)), 0), "landlock ruleset"
    )
    for path, rights in [*((path, READ) for path in paths), *((path, LIST) for path in listed)]:
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= 0b101
        rule = rights.to_bytes(8, sys.byteorder) + handle.to_bytes(4, sys.byteorder)
        checked(libc.syscall(ADD_RULE, ruleset, 1, rule, 0), "landlock rule")
        os.close(handle)
    checked(libc.syscall(RESTRICT_SELF, ruleset, 0), "landlock")
    os.close(ruleset)


def seccomp(program: bytes) -> None:
    """Load a filter of system calls, a BPF program."""

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    filtered = Filter(len(program) // 8, program)
    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(filtered), 0, 0), "seccomp")


def isolate(job: Job) -> None:
    """Give up every right, in the order in which each step is still allowed."""
    limit(job)
    if job["mount"] and job["scratch"]:
        scratch(job["scratch"])
    else:
        os.chdir("/")
    drop_capabilities()
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if job["landlock"]:
        landlock(job["landlock"], job["listed"])
    seccomp(bytes.fromhex(job["filter"]))


def read_all(handle: int) -> str:
    """The text behind a file descriptor."""
    with os.fdopen(handle, "rb") as file:
        # a lone surrogate is an error of the program, reported as such
        return file.read().decode("utf-8", "surrogatepass")


# values between checker and candidate: of exact builtin types only


def pack(value: Any, depth: int = 0) -> Any:
    """A value as JSON. Of a subclass only the builtin part is written; other types are refused."""
    if depth > 40:
        raise TypeError("a value nested more than 40 deep cannot cross")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return ["int", hex(int.__index__(value))]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, complex):
        return ["complex", float.hex(value.real), float.hex(value.imag)]
    if isinstance(value, str):
        return ["str", str.__str__(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    sequences: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in sequences:
        if isinstance(value, kind):
            return [kind.__name__, [pack(item, depth + 1) for item in kind.__iter__(value)]]
    if isinstance(value, dict):
        return [
            "dict",
            [[pack(key, depth + 1), pack(item, depth + 1)] for key, item in dict.items(value)],
        ]
    raise TypeError(f"a {type(value).__name__} cannot cross; return a builtin type")


def unpack(data: Any) -> Any:
    """The value that `pack` wrote, of exact builtin types."""
    if data is None or data is True or data is False:
        return data
    kind, *rest = data
    if kind == "int":
        return int(rest[0], 16)
    if kind == "float":
        return float.fromhex(rest[0])
    if kind == "complex":
        return complex(float.fromhex(rest[0]), float.fromhex(rest[1]))
    if kind == "str":
        return str(rest[0])
    if kind == "bytes":
        return bytes.fromhex(rest[0])
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in rest[0]}
    kinds: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](unpack(item) for item in rest[0])


def read_line(handle: int) -> bytes:
    """One line of at most `MAX_LINE` bytes, read unbuffered."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(handle, 65536)
        if not piece:
            raise EOFError("the other side has ended")
        line += piece
        if len(line) > MAX_LINE:
            raise ValueError(f"an answer of more than {MAX_LINE} bytes")
    return line


def write_line(handle: int, data: Any) -> None:
    """Write one value as a line of JSON."""
    text = json.dumps(data).encode() + b"\n"
    while text:
        text = text[os.write(handle, text) :]


# roles


def run_python(job: Job, text: str) -> None:
    """Run a program as `__main__`, in an empty module of its own."""
    try:
        code = compile(text, "<program>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        sys.stderr.write(error_line(error))
        sys.exit(NO_PROGRAM)
    try:
        exec(code, {"__name__": "__main__", "__builtins__": __builtins__})
    except Exception as error:
        import traceback

        sys.stdout.flush()
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without this file's
        sys.stderr.write(
            "".join(traceback.format_list(frames)) + traceback.format_exception_only(error)[-1]
        )
        sys.exit(1)


def run_candidate(job: Job, text: str) -> None:
    """Load the program, then answer one call per line. The program can write to this end of the
    pipe too, so the checker trusts no answer: it only compares its value."""
    calls, answers = job["calls"], job["answers"]
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    space: dict[str, Any] = {"__name__": "candidate", "__builtins__": __builtins__}
    try:
        exec(compile(text, "<program>", "exec", dont_inherit=True), space)
        write_line(answers, ["ready"])
    except BaseException as error:
        write_line(answers, ["error", type(error).__name__, str(error)[:300]])
        return
    while True:
        try:
            name, args, kwargs = unpack(json.loads(read_line(calls)))
        except EOFError:
            return
        try:
            answer = ["value", pack(space[name](*args, **kwargs))]
        except BaseException as error:
            answer = ["error", type(error).__name__, str(error)[:300]]
        write_line(answers, answer)


class Failed(Exception):
    """The candidate raised an exception that is not a builtin one."""


def error_line(error: BaseException) -> str:
    """An exception in one short text."""
    return f"{type(error).__name__}: {error}"[:300]


def builtin_error(name: str, text: str) -> Exception:
    """The builtin exception of this name, or `Failed`."""
    kind: Any = getattr(builtins, str(name), None)
    fits = (
        isinstance(kind, type)
        and issubclass(kind, Exception)
        and not issubclass(kind, (UnicodeError, BaseExceptionGroup))
    )
    return kind(str(text)[:300]) if fits else Failed(f"{name}: {text}"[:300])


def run_checker(job: Job, text: str) -> None:
    """Run the tests and report each at once ("" if it passed), with the nonce that only this
    process knows."""
    calls, answers = job["calls"], job["answers"]
    tests = json.loads(text)

    def say(result: str) -> None:
        write_line(job["verdict"], [tests["nonce"], result])

    def ask() -> Any:
        answer = json.loads(read_line(answers))
        if answer[0] == "error":
            raise builtin_error(answer[1], answer[2])
        return answer

    def proxy(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            write_line(calls, pack([name, list(args), kwargs]))
            return unpack(ask()[1])

        call.__name__ = name
        return call

    try:
        ask()  # "ready"
        broken = ""
    except Exception as error:
        broken = error_line(error)
    for test in tests["tests"]:
        if broken:
            say(broken)
            continue
        space: dict[str, Any] = {"__name__": "checker", "__builtins__": __builtins__}
        try:
            exec(compile(tests["setup"], "<setup>", "exec", dont_inherit=True), space)
            space.update({name: proxy(name) for name in tests["names"]})
            exec(compile(test, "<test>", "exec", dont_inherit=True), space)
            say("")
        except BaseException as error:
            say(error_line(error))


def run_scorer(job: Job, text: str) -> None:
    """Serve scores with the text of `scorer.py`; ready once its packages are imported."""

    def ready() -> None:
        os.write(job["ready"], b"r")
        os.close(job["ready"])

    space: dict[str, Any] = {"__name__": "scorer", "__builtins__": __builtins__}
    exec(compile(text, "scorer.py", "exec", dont_inherit=True), space)
    try:
        space["serve"](job, ready, lambda: seccomp(bytes.fromhex(job["inner_filter"])))
    except Exception as error:
        os.write(2, ("scorer: " + error_line(error)).encode())
        os._exit(1)


def main() -> None:
    job = json.loads(sys.argv[1])
    try:
        text = read_all(job["text"]) if "text" in job else ""
        isolate(job)
        more = sys.argv[2:]
        sys.argv[:] = [""]
        roles = {
            "python": run_python,
            "candidate": run_candidate,
            "checker": run_checker,
            "scorer": run_scorer,
        }
        role = roles.get(job["role"])
        if role is None:
            os.execv(job["argv"][0], job["argv"] + more)
    except Exception as error:
        os.write(2, ("isolation: " + type(error).__name__ + ": " + str(error)).encode())
        os._exit(BAD_JOB)
    if role is not run_scorer:
        os.write(job["ready"], b"r")  # from here on, whatever happens is the program's doing
        os.close(job["ready"])
    role(job, text)


if __name__ == "__main__":
    main()
