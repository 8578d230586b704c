"""Scores answers inside a cage: a process that has imported the scorers, and a fresh child of it
for every answer.

This file is handed to the cage as text (`checker.py` sends it, `warden.py` runs it as the role
`scorer`): standard library alone, and no import of ours. What a model wrote is never read here but
in the child that scores it. The child has its own time and memory, may start no process, holds no
descriptor but the pipe for its verdict, and ends after one verdict, so that nothing an answer does
reaches another one.

An answer must not become code either. Scorers hand answers to `eval`, sympy's parser above all. An
audit hook, which cannot be removed, looks at every piece of code before it runs: expressions of
mathematical functions and numbers pass in sympy's parser, lists of constants elsewhere, and
everything else is refused, which makes the answer a wrong one.
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
BUILD_CONST_KEY_MAP LIST_EXTEND SET_UPDATE UNARY_NEGATIVE UNARY_POSITIVE UNARY_NOT UNARY_INVERT BINARY_OP
CALL_INTRINSIC_1 RETURN_VALUE RETURN_CONST
"""
DISPLAY = frozenset(_DISPLAY.split())
ARITHMETIC = DISPLAY | frozenset(
    ["LOAD_NAME", "PUSH_NULL", "PRECALL", "CALL", "KW_NAMES", "CALL_KW", "COMPARE_OP"]
)
_MATHEMATICS = """
Integer Float Rational Symbol Function Add Mul Pow sqrt cbrt root real_root exp log ln Mod Max Min Abs abs pow
round max min sum Eq Ne Lt Le Gt Ge Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan
And Or Not Tuple Interval Union FiniteSet Integral Derivative pi E I oo zoo nan true false factor expand
simplify
"""
MATHEMATICS = frozenset(_MATHEMATICS.split())


class NotMathematics(BaseException):
    """An answer held code; no scorer may take it for an error of its own and go on with a
    default."""


# what code may run


class Guard:
    """The audit hook of a child."""

    def __init__(self) -> None:
        self.told = ""  # what was refused, even where a scorer goes on after it
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
        self.told = self.told or why
        raise NotMathematics(why)

    def refused(self, code: CodeType, caller: FrameType) -> str:
        """Why the code may not run, "" if it may. `caller` is who runs it: what an answer holds is
        run by a scorer alone."""
        runner = caller.f_code.co_filename
        if runner == IMPORTER or runner in self.generators or code == self.namespace:
            return ""
        parsed = caller.f_code is self.parser
        allowed = ARITHMETIC if parsed else DISPLAY
        found = next(
            (each.opname for each in dis.get_instructions(code) if each.opname not in allowed), ""
        )
        if found:
            return f"the answer is code, not mathematics ({found})"
        known = caller.f_locals.get("local_dict") if parsed else None
        for name in code.co_names:
            if name not in self.names and not isinstance((known or {}).get(name), self.basic):
                return f"the answer is code, not mathematics ({name[:40]})"
        return ""


# the scorers


class Drawing(types.ModuleType):
    """A module that draws, or something of it: not needed for a score, and it would have to write
    files and start threads."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Drawing(name)

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        return (
            importlib.machinery.ModuleSpec(name, cls, is_package=True)
            if name.split(".")[0] in DRAWS
            else None
        )  # type: ignore[arg-type]

    @classmethod
    def create_module(cls, spec: Any) -> types.ModuleType:
        return cls(spec.name)

    @classmethod
    def exec_module(cls, module: Any) -> None:
        """There is nothing in it."""


def math_work(job: dict[str, Any]) -> Callable[[Any], Work]:
    from math_verify import parse, verify

    def parsed(text: str) -> list[Any]:
        return parse(
            text if "$" in text or "\\boxed" in text else f"${text}$", parsing_timeout=None
        )

    def work(request: dict[str, Any]) -> bool:
        gold, answer = parsed(request["gold"]), parsed(request["answer"])
        return bool(gold and answer and verify(gold, answer, timeout_seconds=None))

    for answer in (
        "0.5",
        "x+1",
        "(1,2)",
        "[1,2)",
        "x=3",
    ):  # builds the grammar, which takes a while
        work({"gold": "\\frac{1}{2}", "answer": answer})
    return lambda setup: work


def gym_score(dataset: Any, request: dict[str, Any]) -> Any:
    """The set's own score. Not a number is within any bound that a set sets wrongly (`min(1, nan)`
    is 1), so no answer is one."""
    answer, entry = request["answer"], unplain(request["entry"])
    if (found := NOT_FINITE.search(answer)) and found[0].lower() not in str(
        entry["answer"]
    ).lower():
        raise ValueError(f"{found[0]} is no answer")
    return dataset.score_answer(answer=answer, entry=entry)


def gym_work(job: dict[str, Any]) -> Callable[[Any], Work]:
    sys.meta_path.insert(0, Drawing)
    import reasoning_gym

    made: dict[str, Work] = {}

    def prepared(setup: Any) -> Work:
        key = json.dumps(setup, sort_keys=True)
        if key not in made:
            name, args = setup
            dataset = reasoning_gym.create_dataset(name, **args)
            made[key] = functools.partial(gym_score, dataset)
        return made[key]

    return prepared


def unplain(value: Any) -> Any:
    """The value of which `checker.plain` made JSON."""
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
    """Write one verdict and end. `shut` gives up the right to start processes."""
    try:
        guard = bound(verdict, seconds, shut)
        value = float(work(json.loads(body)))
        if guard.told:
            raise NotMathematics(guard.told)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"a score from 0 to 1 expected, got {value}")
        told: dict[str, Any] = {"result": value}
    except BaseException as error:
        told = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    os.write(CHANNEL, json.dumps(told).encode()[:VERDICT])


def bound(verdict: int, seconds: float, shut: Callable[[], None]) -> Guard:
    """Give up everything but the channel of the verdict (and /dev/null, which the first three
    descriptors are)."""
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


# the process that has them


def verdict_of(work: Work, body: bytes, seconds: float, shut: Callable[[], None]) -> dict[str, Any]:
    """What a child of its own says of one answer; a child that says nothing proper has failed."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            score(into, work, body, seconds, shut)
        finally:
            os._exit(0)
    os.close(into)
    said = b""
    while piece := os.read(out, VERDICT + 1):
        said = (said + piece)[: VERDICT + 1]
    os.close(out)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL):
            return {"late": True}
        return {"error": f"the scorer ended by signal {number}"}
    return understood(said)


def understood(said: bytes) -> dict[str, Any]:
    """A verdict that is nothing but a score from 0 to 1, or an error in a few words."""
    try:
        told = json.loads(said)
        if isinstance(told, dict) and len(told) == 1:
            if type(value := told.get("result")) is float and 0.0 <= value <= 1.0:
                return {"result": value}
            if type(words := told.get("error")) is str:
                return {"error": words[:320]}
    except ValueError:
        pass
    return {"error": "the scorer ended without a verdict"}


def exactly(handle: int, size: int) -> bytes:
    got = bytearray()
    while len(got) < size:
        piece = os.read(handle, min(1 << 20, size - len(got)))
        if not piece:
            raise EOFError
        got += piece
    return bytes(got)


def serve(job: dict[str, Any], ready: Callable[[], None], shut: Callable[[], None]) -> None:
    """Answer requests until there are no more. A request is its length in 8 bytes, then a header of
    one line (ours), then the rest."""
    sys.path += job["packages"]
    os.environ.update(
        dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    )  # no thread may start
    prepare = WORKERS[job["argv"][0]](job)
    gc.freeze()
    for standard in (1, 2):
        os.dup2(0, standard)  # /dev/null: whatever a library prints, nobody reads it
    ready()
    while True:
        try:
            size = int.from_bytes(exactly(job["requests"], 8), "big")
        except EOFError:
            return
        head, body = exactly(job["requests"], size).split(b"\n", 1)
        asked = json.loads(head)
        try:
            told = verdict_of(prepare(asked["setup"]), body, asked["seconds"], shut)
        except Exception as error:  # of the set's own making: no answer was looked at
            told = {"error": f"{type(error).__name__}: {error}"[:320]}
        os.write(job["verdicts"], json.dumps({"id": asked["id"], **told}).encode() + b"\n")
