"""The scorer: a process that has imported the scorers of answers, and forks a fresh child for every
answer. It is isolated.

This file is sent as text (`rewards.math_check` sends it, `init` runs it as the role `scorer`):
standard library only, and no import of marlora. A model's text is only read in the child that
scores it. The child has its own time and memory limits, may start no process, has no descriptor but
the pipe for its verdict, and ends after one verdict, so an answer cannot affect the next one.

An answer must not become code either. Scorers pass answers to `eval`, sympy's parser above all. An
audit hook, which cannot be removed, checks every piece of code before it runs: expressions of
mathematical functions and numbers pass in sympy's parser, lists of constants elsewhere; any other
code is refused, and the answer is wrong.
"""

from __future__ import annotations

import collections
import dataclasses
import dis
import functools
import gc
import importlib.machinery
import json
import math
import os
import re
import resource
import signal
import sys
import types

TYPING = False
if TYPING:
    from collections.abc import Callable
    from types import CodeType, FrameType
    from typing import Any

    Work = Callable[[dict[str, Any]], Any]

CHANNEL = 3  # the file descriptor of a child's verdict
DRAWS = "matplotlib", "mpl_toolkits"
VERDICT = 1000  # bytes of a child's verdict, all it may write
FORBIDDEN = (
    "os.",
    "subprocess.",
    "shutil.",
    "socket.",
    "ctypes.",
    "pty.",
    "tempfile.",
    "webbrowser.",
    "signal.",
    "fcntl.",
    "mmap.",
)
ALLOWED = ("os.listdir", "os.scandir", "os.walk", "os.fwalk")
IMPORTER = "<frozen importlib._bootstrap>"
NOT_FINITE = re.compile(r"(?<![a-z])(?:nan|inf|infinity)[ij]?(?![a-z])", re.IGNORECASE)
# Instructions of displays and of arithmetic, over all versions of Python; no attribute, no
# function, no import, no loop.
_DISPLAY = """
RESUME NOP CACHE EXTENDED_ARG LOAD_CONST LOAD_SMALL_INT BUILD_TUPLE BUILD_LIST BUILD_SET BUILD_MAP
BUILD_CONST_KEY_MAP LIST_EXTEND SET_UPDATE UNARY_NEGATIVE UNARY_POSITIVE UNARY_NOT UNARY_INVERT
BINARY_OP
CALL_INTRINSIC_1 RETURN_VALUE RETURN_CONST
"""
DISPLAY = frozenset(_DISPLAY.split())
ARITHMETIC = DISPLAY | frozenset(
    ["LOAD_NAME", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "CALL_KW", "COMPARE_OP"]
)
_MATHEMATICS = """
Integer Float Rational Symbol Function Add Mul Pow sqrt cbrt root real_root exp log ln Mod Max Min
Abs abs pow
round max min sum Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan StrictGreaterThan
GreaterThan
And Or Not Tuple Interval Union FiniteSet Integral Derivative pi E I oo zoo nan true false factor
expand
simplify
"""
MATHEMATICS = frozenset(_MATHEMATICS.split())


class NotMathematics(BaseException):
    """An answer held code. A `BaseException`, so that no scorer catches it and goes on with a
    default."""


# what code may run


class Guard:
    """The audit hook of a child."""

    def __init__(self) -> None:
        self.reason = ""  # what was refused first, even if a scorer goes on after it
        self.parser: CodeType | None = None
        self.namespace: CodeType | None = None
        self.generators = {
            collections.__file__,
            dataclasses.__file__,
        }  # code they made of names that were checked, for classes
        self.names = MATHEMATICS
        self.basic: type = type(None)
        if "sympy" in sys.modules:
            import sympy
            from sympy.parsing import sympy_parser
            from sympy.polys import monomials

            self.generators.add(monomials.__file__)  # of a number of variables
            self.parser, self.basic = sympy_parser.eval_expr.__code__, sympy.Basic
            self.namespace = compile("from sympy import *", "<string>", "exec")
            kinds = sympy.Function, type(sympy.Function)
            functions = {
                name
                for name, value in vars(sympy).items()
                if isinstance(value, kinds[1]) and issubclass(value, kinds[0])
            }
            self.names = MATHEMATICS | functions

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "exec":
            why = self.refused(args[0], sys._getframe(1))
            if why:
                self.refuse(why)
        elif event == "open":
            if set(str(args[1] or "")) & set("wax+") or (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                self.refuse("files are only read here")
        elif event.startswith(FORBIDDEN) and event not in ALLOWED:
            self.refuse(f"{event} is refused in a scorer")

    def refuse(self, why: str) -> None:
        self.reason = self.reason or why
        raise NotMathematics(why)

    def refused(self, code: CodeType, caller: FrameType) -> str:
        """Why the code may not run, "" if it may. `caller`: the frame that runs it; text of an
        answer is run by scorers only."""
        runner = caller.f_code.co_filename
        if runner == IMPORTER or runner in self.generators or code == self.namespace:
            return ""
        parsed = caller.f_code is self.parser
        allowed = ARITHMETIC if parsed else DISPLAY
        names = (each.opname for each in dis.get_instructions(code))
        forbidden = next((name for name in names if name not in allowed), "")
        if forbidden:
            return f"the answer is code, not mathematics ({forbidden})"
        known = caller.f_locals.get("local_dict") if parsed else None
        for name in code.co_names:
            if name not in self.names and not isinstance((known or {}).get(name), self.basic):
                return f"the answer is code, not mathematics ({name[:40]})"
        return ""


# the scorers


class Drawing(types.ModuleType):
    """A stand-in for modules that draw: no score needs them, and they write files and start
    threads."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Drawing(name)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] not in DRAWS:
            return None
        loader: Any = cls
        return importlib.machinery.ModuleSpec(name, loader, is_package=True)

    @classmethod
    def create_module(cls, spec: Any) -> types.ModuleType:
        return cls(spec.name)

    @classmethod
    def exec_module(cls, module: Any) -> None:
        """The module is empty."""


def math_work(job: dict[str, Any]) -> Callable[[Any], Work]:
    """math-verify: whether an answer equals the right one."""
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        return parse(
            text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None
        )

    def work(request: dict[str, Any]) -> bool:
        gold, answer = parsed(request["gold"]), parsed(request["answer"])
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))

    for answer in ("0.5", "x+1", "(1,2)", "[1,2)", "x=3"):  # builds the grammar, which is slow
        work({"gold": "\\frac{1}{2}", "answer": answer})
    return lambda setup: work


def gym_score(dataset: Any, request: dict[str, Any]) -> Any:
    """The task set's own score. `nan` passes bounds that a set checks wrongly (`min(1, nan)` is 1),
    so an answer with nan or infinity is refused unless the right one has it."""
    answer, entry = request["answer"], unplain(request["entry"])
    match = NOT_FINITE.search(answer)
    if match and match[0].lower() not in str(entry["answer"]).lower():
        raise ValueError(f"{match[0]} is no answer")
    return dataset.score_answer(answer=answer, entry=entry)


def gym_work(job: dict[str, Any]) -> Callable[[Any], Work]:
    """The scorers of reasoning-gym's task sets, by name and arguments."""
    sys.meta_path.insert(0, Drawing)
    import reasoning_gym

    works: dict[str, Work] = {}

    def prepared(setup: Any) -> Work:
        key = json.dumps(setup, sort_keys=True)
        if key not in works:
            name, args = setup
            dataset = reasoning_gym.create_dataset(name, **args)
            works[key] = functools.partial(gym_score, dataset)
        return works[key]

    return prepared


def unplain(value: Any) -> Any:
    """The inverse of `json_values.plain`; a copy of `json_values.unplain`, which cannot be imported
    here."""
    if isinstance(value, list):
        return [unplain(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {unplain(key): unplain(item) for key, item in inner}
    kinds: dict[str, Any] = {"tuple": tuple, "set": set}
    return inner if kind == "text" else kinds[kind](unplain(item) for item in inner)


WORKERS = {"math": math_work, "reasoning_gym": gym_work}


# a child, which sees one answer


def score(verdict: int, work: Work, body: bytes, seconds: float, shut: Callable[[], None]) -> None:
    """Write one verdict. `shut` gives up the right to start processes."""
    try:
        guard = bound(verdict, seconds, shut)
        value = float(work(json.loads(body)))
        if guard.reason:
            raise NotMathematics(guard.reason)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"a score from 0 to 1 expected, got {value}")
        outcome: dict[str, Any] = {"result": value}
    except BaseException as error:
        outcome = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    os.write(CHANNEL, json.dumps(outcome).encode()[:VERDICT])


def bound(verdict: int, seconds: float, shut: Callable[[], None]) -> Guard:
    """Give up everything but the pipe for the verdict (the first three descriptors are
    /dev/null)."""
    os.dup2(verdict, CHANNEL)
    os.closerange(CHANNEL + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    limit = math.ceil(seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    shut()
    guard = Guard()
    sys.addaudithook(guard)
    return guard


# the process that has imported the scorers


def verdict_of(work: Work, body: bytes, seconds: float, shut: Callable[[], None]) -> dict[str, Any]:
    """The verdict of a child process on one answer; without a valid one the child has failed."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            score(into, work, body, seconds, shut)
        finally:
            os._exit(0)
    os.close(into)
    output = b""
    while piece := os.read(out, VERDICT + 1):
        output = (output + piece)[: VERDICT + 1]
    os.close(out)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
            return {"late": True}
        return {"error": f"the scorer ended by signal {number}"}
    return valid_verdict(output)


def valid_verdict(output: bytes) -> dict[str, Any]:
    """A child's output as a verdict: a score from 0 to 1, or a short error."""
    try:
        data = json.loads(output)
        if isinstance(data, dict) and len(data) == 1:
            if type(value := data.get("result")) is float and 0.0 <= value <= 1.0:
                return {"result": value}
            if type(text := data.get("error")) is str:
                return {"error": text[:320]}
    except ValueError:
        pass
    return {"error": "the scorer ended without a verdict"}


def exactly(handle: int, size: int) -> bytes:
    """`size` bytes of a pipe. Raises `EOFError` if it ends before."""
    data = bytearray()
    while len(data) < size:
        piece = os.read(handle, min(1 << 20, size - len(data)))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def serve(job: dict[str, Any], ready: Callable[[], None], shut: Callable[[], None]) -> None:
    """Answer requests until the pipe ends. A request is its length in 8 bytes, a header of one line
    (written by marlora), then the body."""
    sys.path += job["packages"]
    threads = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    os.environ.update(dict.fromkeys(threads, "1"))  # no thread may start
    prepare = WORKERS[job["argv"][0]](job)
    gc.freeze()
    for standard in (1, 2):
        os.dup2(0, standard)  # /dev/null: output of libraries is not read
    ready()
    while True:
        try:
            size = int.from_bytes(exactly(job["requests"], 8), "big")
        except EOFError:
            return
        head, body = exactly(job["requests"], size).split(b"\n", 1)
        request = json.loads(head)
        try:
            verdict = verdict_of(prepare(request["setup"]), body, request["seconds"], shut)
        except Exception as error:  # of making the task set: no answer was read
            verdict = {"error": f"{type(error).__name__}: {error}"[:320]}
        os.write(job["verdicts"], json.dumps({"id": request["id"], **verdict}).encode() + b"\n")
