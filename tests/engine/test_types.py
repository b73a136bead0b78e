"""Arguments and results come back as they went, by annotation or by tag, or are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, make_dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from functools import partial
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    NoReturn,
    ParamSpec,
    TypedDict,
    TypeVar,
)
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest

from qtasks import SerializationError
from qtasks.asyncio import QueueTasks
from qtasks.cli.arguments import read_arguments
from qtasks.execution.definition import TaskDefinition, TaskOptions
from qtasks_core import TaskMessage
from qtasks_core.errors import BadArguments, ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")
UserId = NewType("UserId", int)
UID = UUID("12345678-1234-5678-1234-567812345678")
WHEN = datetime(2024, 2, 29, 12, 30, tzinfo=UTC)


ZONED = datetime(2024, 2, 29, 12, 30, tzinfo=ZoneInfo("Europe/Berlin"))


class Text(str):
    pass


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Level(IntEnum):
    LOW = 1


@dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.0


@dataclass
class Page(Generic[T]):
    items: list[T]
    total: int = 0


@dataclass
class Open:
    payload: dict[str, Any]
    extra: Any = None
    children: list[Open] = field(default_factory=list)


class Frozen(msgspec.Struct, frozen=True, rename="camel"):
    the_payload: Any
    at: datetime | None = None


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    name: str


class Row(TypedDict, total=False):
    id: int
    data: Any


class Pair(NamedTuple):
    left: int
    right: Any


class Money(pydantic.BaseModel):
    amount: Decimal
    currency: Literal["EUR", "USD"] = "EUR"
    tags: set[str] = set()


class Order(pydantic.BaseModel):
    id: UUID
    lines: list[Money]


class Named(pydantic.BaseModel):
    """What pydantic itself reads by other names or types than it writes."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    id: UUID = pydantic.Field(alias="theId")
    at: datetime = pydantic.Field(validation_alias="when")
    numbers: pydantic.Json[list[int]] = [1]

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def year(self) -> int:
        return self.at.year


class Loose(pydantic.BaseModel):
    """What JSON alone would not tell apart."""

    payload: Any = None
    by: dict[str, Any] = {}
    either: tuple[int, ...] | list[int] | UUID | str = ""
    number: int = 1 << 70
    raw: bytes = b"\xc3\xbc"
    inner: list[Loose] = []


class Strict(pydantic.BaseModel, strict=True):
    """What only JSON gives it, beside what is given as it is."""

    file: Path
    color: Color
    raw: bytes
    id: UUID
    span: tuple[timedelta, complex]
    models: frozenset[Tag] = frozenset()


class Tag(pydantic.BaseModel, frozen=True):
    name: str


class Login(pydantic.BaseModel):
    password: pydantic.SecretStr


class Revealed(Login):
    @pydantic.field_serializer("password", when_used="json")
    def reveal(self, password: pydantic.SecretStr) -> str:
        return password.get_secret_value()


ORDER = Order(id=UID, lines=[Money(amount=Decimal("1.10"), tags={"a"})])
NAMED = Named.model_validate({"theId": UID, "when": WHEN, "numbers": "[1, 2]"})
LOOSE = Loose(
    payload=(1, {UID}), by={"d": Decimal("1.0"), "l": [(1,)], "n": {1: b"\xff"}}, either=(1, 2)
)
STRICT = Strict(
    file=Path("/x"), color=Color.RED, raw=b"ok", id=UID, span=(timedelta(microseconds=1), 1j)
)
MIXED = {"t": (1, 2), "s": {1}, "u": UID, "d": Decimal("1.0"), "w": WHEN, "big": 1 << 70}

CASES: list[tuple[Any, Any]] = [
    (int, 3),
    (int, -(1 << 63)),
    (float, 2),
    (str, "ü\0"),
    (bytes, b"\xff"),
    (bool, True),
    (None, None),
    (Any, MIXED),
    (object, MIXED),
    (dict, MIXED),
    (dict[str, Any], MIXED),
    (dict[str, object], {"t": [1, "2"]}),
    (dict[str, object], MIXED),
    (list[object] | None, [(1, UID)]),
    (object | None, (1,)),
    (dict[object, object], {1: (2,)}),
    (dict[str, list[Any]], {"a": [(1, UID)]}),
    (list, [(1, 2), UID]),
    (list[Any] | None, [(1,)]),
    (list[Any] | None, None),
    (dict[str, Any] | list[Any] | int, {"t": (1,)}),
    (dict[str, Any] | list[Any] | int, [{1}]),
    (dict[str, Any] | list[Any] | int, 5),
    (tuple, ((1,), UID)),
    (tuple[int, Any], (1, (2, WHEN))),
    (tuple[Any, ...], (1, (2,))),
    (tuple[int, str], (1, "a")),
    (set[Any], {(1, 2), "x"}),
    (set[UUID], {UID}),
    (frozenset[int], frozenset({1, 2})),
    (Sequence[int], [1, 2]),
    (UUID, UID),
    (Decimal, Decimal("1.10")),
    (datetime, WHEN),
    (datetime, datetime(2024, 1, 1)),
    (date, date(2024, 1, 1)),
    (timedelta, timedelta(days=1, microseconds=3)),
    (Color, Color.BLUE),
    (Level, Level.LOW),
    (dict[Color, int], {Color.RED: 1}),
    (Literal["a", 1], 1),
    (UserId, UserId(7)),
    (int | str, "x"),
    (int | None, None),
    (Point, Point(1, 2.5)),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, Point], {"a": Point(1)}),
    (Page[Point], Page([Point(1)], 1)),
    (Page[Any], Page([(1,), UID])),
    (Open, Open(dict(MIXED), (1,), [Open({"t": (2,)})])),
    (list[Open], [Open({}, {1})]),
    (Frozen, Frozen((1, UID), WHEN)),
    (Cat | Dog, Dog("Rex")),
    (list[Cat | Dog], [Cat(9), Dog("Rex")]),
    (Row, {"id": 1, "data": (1, 2)}),
    (Row, {"id": 1}),
    (Pair, Pair(1, (2,))),
    (Money, ORDER.lines[0]),
    (Order, ORDER),
    (list[Order], [ORDER]),
    (dict[str, Money], {"a": ORDER.lines[0]}),
    (Named, NAMED),
    (list[Named], [NAMED]),
    (Loose, LOOSE),
    (Loose, Loose(either=UID, inner=[LOOSE])),
    (list[Loose], [Loose(either=[1])]),
    (Strict, STRICT),
    (Strict, STRICT.model_copy(update={"models": frozenset({Tag(name="a")})})),
    (Revealed, Revealed(password=pydantic.SecretStr("hunter2"))),
    (Money | None, None),
    (Money | None, ORDER.lines[0]),
]


def echo_of(annotation: Any) -> TaskDefinition:
    def echo(value):  # type: ignore[no-untyped-def]
        return value

    echo.__annotations__ = {"value": annotation, "return": annotation}
    return TaskDefinition(echo, "echo", TaskOptions())


def sent(definition: TaskDefinition, *args: Any, **kwargs: Any) -> TaskMessage:
    encoded, by_name = definition.encode(args, kwargs)
    return TaskMessage(uuid="1", task_name="echo", args=encoded, kwargs=by_name)


def exactly(value: Any) -> Any:
    """Return what tells apart what is equal and of another type, in depth."""
    if isinstance(value, dict):
        return type(value), {key: exactly(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value), [exactly(item) for item in value]
    return type(value), value


@pytest.mark.parametrize(
    ("annotation", "value"), CASES, ids=[f"{n}-{case[0]}" for n, case in enumerate(CASES)]
)
def test_it_comes_back_as_it_went(annotation: Any, value: Any) -> None:
    definition = echo_of(annotation)
    before = repr(value)
    for message in (sent(definition, value), sent(definition, value=value)):
        taken = definition.invoke(message)
        returned = definition.decode_result(definition.encode_result(taken))
        for there in (taken, returned):
            assert there == value
            if annotation is not float:
                assert exactly(there) == exactly(value)
    assert repr(value) == before, "encoding leaves it alone"


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (int, "3", "argument 'value': Expected `int`, got `str`"),
        (int, 1.0, "argument 'value': Expected `int`, got `float`"),
        (int, True, "argument 'value': Expected `int`, got `bool`"),
        (int, None, "argument 'value': Expected `int`, got `NoneType`"),
        (float, "1", "argument 'value': Expected `float`, got `str`"),
        (str, UID, "argument 'value': Expected `str`, got `UUID`"),
        (str, b"x", "argument 'value': Expected `str`, got `bytes`"),
        (bytes, "x", "argument 'value': Expected `bytes`, got `str`"),
        (bool, 1, "argument 'value': Expected `bool`, got `int`"),
        (Any, Point(1), "argument 'value': a .*Point would not come back as it is"),
        (dict[str, Any], {"p": [Point(1)]}, "argument 'value': a .*Point would not come back"),
        (Open, Open({"p": Point(1)}), "argument 'value': a .*Point would not come back"),
        (dict, {(1, 2): 3}, "argument 'value': a tuple cannot be a key"),
        (Point, object(), "argument 'value': .*object"),
        (Any, ZONED, "argument 'value': a datetime in Europe/Berlin would come back without"),
        (Any, ZONED.timetz(), "argument 'value': a time in Europe/Berlin would come back without"),
        (Any, datetime(2024, 10, 27, 2, fold=1), "argument 'value': a datetime with fold=1 would"),
        (Any, Level.LOW, "argument 'value': a .*Level would not come back"),
        (Any, Text("x"), "argument 'value': a .*Text would not come back"),
        (list[object], [Point(1)], "argument 'value': a .*Point would not come back as it is"),
        (Any, [10**5000], "argument 'value': Exceeds the limit"),
        (Path, Path("/x"), r"argument 'value': .*\.Path'> has no encoding"),
        (Path, "/x", r"argument 'value': .*\.Path'> has no encoding"),
        (Iterable[int], [1], r"argument 'value': .*Iterable\[int\] has no encoding"),
        (list[Path], [Path("/x")], "argument 'value': a PosixPath has no encoding"),
        (Login, Login(password=pydantic.SecretStr("a")), "'value': a SecretStr would come back as"),
    ],
)
def test_it_is_refused_where_it_is_sent(annotation: Any, value: Any, says: str) -> None:
    definition = echo_of(annotation)
    with pytest.raises(SerializationError, match=says):
        sent(definition, value)
    with pytest.raises(SerializationError, match=says):
        sent(definition, value=value)


@pytest.mark.parametrize(
    ("annotation", "value", "says"),
    [
        (Point, {"x": "one"}, r"argument 'value': Expected `int`, got `str` - at `\$.x`"),
        (list[Point], [{"x": 1}, {}], r"argument 'value': Object missing required field `x`"),
        (Color, "green", "argument 'value': Invalid enum value 'green'"),
        (Literal["a"], "b", "argument 'value': Invalid enum value 'b'"),
        (UUID, "no", "argument 'value': Invalid UUID"),
        (Cat | Dog, {"type": "Cow"}, "argument 'value': Invalid value 'Cow'"),
        (Money, {"amount": "1", "currency": "GBP"}, "argument 'value': 1 validation error"),
        (dict[str, Money], {"a": {}}, "argument 'value': 1 validation error"),
        (Annotated[int, msgspec.Meta(gt=0)], 0, "argument 'value': Expected `int` >= 1"),
        (list[Annotated[str, msgspec.Meta(max_length=1)]], ["ab"], "argument 'value': Expected"),
        (int | None, "1", r"argument 'value': Expected `int \| null`, got `str`"),
    ],
)
def test_the_worker_refuses_what_another_sender_sent(
    annotation: Any, value: Any, says: str
) -> None:
    with pytest.raises(BadArguments, match=says):
        echo_of(annotation).invoke(sent(echo_of(Any), value))


def test_a_moment_with_an_annotation_arrives_in_utc() -> None:
    taken = echo_of(datetime).invoke(sent(echo_of(datetime), ZONED))
    assert (taken, taken.tzinfo) == (ZONED, UTC)


DEEP = b"\x91" * 100_000 + b"\x90"
SET = b"\xc7\x03\x02\x91\x91\x01"
"""An extension: a set whose item is a list."""


@pytest.mark.parametrize("annotation", [Any, int, list[Any], dict[str, list[int]]])
@pytest.mark.parametrize("args", [DEEP, b"\x91" + SET], ids=["deep", "unhashable"])
def test_bytes_that_nobody_here_has_sent(annotation: Any, args: bytes) -> None:
    definition = echo_of(annotation)
    with pytest.raises(BadArguments):
        definition.invoke(TaskMessage(uuid="1", task_name="echo", args=args))
    named = b"\x81\xa5value" + args[1:]
    with pytest.raises(BadArguments):
        definition.invoke(TaskMessage(uuid="1", task_name="echo", kwargs=named))
    with pytest.raises(SerializationError):
        definition.decode_result(args[1:])


@pytest.mark.parametrize("annotation", [str | bytes, Money | int, "list[", "1 + ''"])
@pytest.mark.parametrize("where", ["value", "return"])
def test_an_annotation_without_an_encoding_is_told(annotation: Any, where: str) -> None:
    def echo(value):  # type: ignore[no-untyped-def]
        return value

    echo.__annotations__ = {where: annotation}
    with pytest.raises(
        ConfigurationError,
        match=r"task (echo: .* has no encoding|.*test_types.*echo: an annotation)",
    ):
        TaskDefinition(echo, "echo", TaskOptions())


def test_an_annotation_that_is_no_type_is_told() -> None:
    def echo(value):  # type: ignore[no-untyped-def]
        return value

    echo.__annotations__ = {"value": [int]}
    with pytest.raises(ConfigurationError, match=r"'value': .*int.* has no encoding"):
        TaskDefinition(echo, "echo", TaskOptions())


def test_the_inner_function_of_a_decorator_takes_what_comes() -> None:
    def passing(function: Callable[P, T]) -> Callable[P, T]:
        def inner(*args: P.args, **kwargs: P.kwargs) -> T:
            return function(*args, **kwargs)

        return inner

    definition = TaskDefinition(passing(dict), "dict", TaskOptions())
    assert definition.invoke(sent(definition, {"a": (1,)}, b={2})) == {"a": (1,), "b": {2}}


class Caller:
    def __call__(self) -> None: ...


@pytest.mark.parametrize(
    "what",
    [partial(print, 1), Caller(), 3, property(), max, dict, str.upper, staticmethod(print)],
)
@pytest.mark.parametrize("name", [None, "named"])
def test_what_is_no_function_is_told(app: QueueTasks, what: Any, name: str | None) -> None:
    with pytest.raises(ConfigurationError, match="is no function"):
        app.task(name)(what)


async def test_methods(app: QueueTasks) -> None:
    class Shop:
        def __init__(self, factor: int) -> None:
            self.factor = factor

        def price(self, of: int) -> int:
            return of * self.factor

        @classmethod
        async def owner(cls) -> str:
            return cls.__name__

        @staticmethod
        def size(self: int, /, cls: int = 2) -> int:
            return self * cls

    price = app.task()(Shop(3).price)
    owner = app.task()(Shop.owner)
    size = app.task()(Shop.size)
    async with app.worker():
        assert (await price.add_task(2, timeout=120)).returning == 6
        assert (await owner.add_task(timeout=120)).returning == "Shop"
        assert (await size.add_task(2, cls=5, timeout=120)).returning == 10


def test_a_model_is_read_by_its_aliases_too() -> None:
    message = sent(echo_of(Any), {"theId": str(UID), "when": WHEN.isoformat(), "numbers": "[1, 2]"})
    assert echo_of(Named).invoke(message) == NAMED


@pytest.mark.parametrize(
    ("annotation", "result", "says"),
    [
        (int, "3", "Expected `int`, got `str`"),
        (None, 3, "Expected `null`, got `int`"),
        (int | None, "3", r"Expected `int \| null`, got `str`"),
        (Point, Point("one"), r"Expected `int`, got `str` - at `\$.x`"),  # type: ignore[arg-type]
        (Point, None, "Expected `object`, got `null`"),
        (list[int], ["a"], r"Expected `int`, got `str` - at `\$\[0\]`"),
        (dict[str, Point], {"a": 1}, "Expected `object`, got `int`"),
        (tuple[int, int], (1, 2, 3), "Expected `array` of length 2, got 3"),
        (Color, "green", "Invalid enum value 'green'"),
        (Literal["a"], "b", "Invalid enum value 'b'"),
        (Money, {"amount": "much"}, "1 validation error"),
        (complex, 1j, "<class 'complex'> has no encoding"),
        (Any, Point(1), "a .*Point would not come back as it is; annotate it with its type"),
        (Any, ORDER, "a .*Order would not come back as it is; annotate it with its type"),
    ],
)
def test_a_result_that_nobody_could_read_is_refused(
    annotation: Any, result: Any, says: str
) -> None:
    with pytest.raises(SerializationError, match=says):
        echo_of(annotation).encode_result(result)


@dataclass
class Unfinished:
    inner: Later  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("annotation", "says"),
    [
        (Unfinished, "name 'Later' is not defined"),
        (list[Unfinished], "name 'Later' is not defined"),
        (Point | Open, "more than one dataclass"),
        (list[int] | set[int], "more than one array-like"),
    ],
)
def test_a_type_without_an_encoding_is_refused_when_declared(annotation: Any, says: str) -> None:
    def takes(value):  # type: ignore[no-untyped-def]
        return value

    takes.__annotations__ = {"value": annotation}
    with pytest.raises(ConfigurationError, match=f"task takes: parameter 'value': .*{says}"):
        TaskDefinition(takes, "takes", TaskOptions())
    takes.__annotations__ = {"return": annotation}
    with pytest.raises(ConfigurationError, match=f"task takes: the result: .*{says}"):
        TaskDefinition(takes, "takes", TaskOptions())


def test_a_function_may_never_return() -> None:
    def fails() -> NoReturn:
        raise RuntimeError

    assert TaskDefinition(fails, "fails", TaskOptions())


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (Named, NAMED.model_dump_json(round_trip=True), NAMED),
        (list[Point], '[{"x": 1}]', [Point(1)]),
        (UUID, f'"{UID}"', UID),
        (Color | None, '"red"', Color.RED),
        (object, "[1]", [1]),
    ],
)
def test_a_shell_passes_the_same_types(annotation: Any, text: str, value: Any) -> None:
    assert read_arguments(echo_of(annotation), [text]) == ([value], {})
    assert read_arguments(echo_of(annotation), [f"value={text}"]) == ([value], {})


class Name(str):
    pass


class Count(int):
    pass


class Share(float):
    pass


class Blob(bytes):
    pass


class Moment(datetime):
    pass


class Day(date):
    pass


class Hour(time):
    pass


class Span(timedelta):
    pass


class Price(Decimal):
    pass


class Key(UUID):
    pass


class Suit(StrEnum):
    SPADES = "spades"


DERIVED = [
    (str, Name("x"), "x"),
    (str, Suit.SPADES, "spades"),
    (int, Count(3), 3),
    (int, Level.LOW, 1),
    (float, Share(0.5), 0.5),
    (float, Count(3), 3.0),
    (bytes, Blob(b"x"), b"x"),
    (bytes, bytearray(b"x"), b"x"),
    (datetime, Moment(2024, 1, 2, 3, 4, tzinfo=UTC), datetime(2024, 1, 2, 3, 4, tzinfo=UTC)),
    (date, Day(2024, 1, 2), date(2024, 1, 2)),
    (time, Hour(3, 4, 5, 6), time(3, 4, 5, 6)),
    (timedelta, Span(1, 2, 3), timedelta(1, 2, 3)),
    (Decimal, Price("1.50"), Decimal("1.50")),
    (UUID, Key(int=1), UUID(int=1)),
]


@pytest.mark.parametrize(("scalar", "value", "plain"), DERIVED)
def test_a_class_derived_from_a_scalar_goes_through_everywhere(
    scalar: Any, value: Any, plain: Any
) -> None:
    """As an argument and as a result: what is accepted in one place is in all."""
    Holder = make_dataclass("Holder", [("held", scalar)])  # a class
    places: list[tuple[Any, Any, Any]] = [
        (scalar, value, plain),
        (scalar | None, value, plain),
        (list[scalar], [value], [plain]),
        (set[scalar], {value} if value.__hash__ else [plain], {plain}),
        (tuple[scalar, int], (value, 1), (plain, 1)),
        (dict[str, scalar], {"k": value}, {"k": plain}),
        (dict[str, list[scalar | None]], {"k": [value]}, {"k": [plain]}),
        (Holder, Holder(value), Holder(plain)),
    ]
    if value.__hash__ and scalar is not bytes:
        places.append((dict[scalar, int], {value: 1}, {plain: 1}))
    for annotation, given, expected in places:
        definition = echo_of(annotation)
        arrived = definition.invoke(sent(definition, given))
        assert exactly(arrived) == exactly(expected), annotation
        result = definition.decode_result(definition.encode_result(given))
        assert exactly(result) == exactly(expected), annotation


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, True),
        (int | None, True),
        (list[int], [1, True]),
        (str | None, 1),
        (list[str], ["x", 1]),
        (dict[str, str], {"x": 1}),
        (dict[str, list[int | None]], {"x": ["y"]}),
        (Color | None, "puce"),
        (datetime | None, 1j),
    ],
)
def test_what_standard_types_do_not_allow_is_refused_where_it_is_sent(
    annotation: Any, value: Any
) -> None:
    with pytest.raises(SerializationError, match="argument 'value'"):
        sent(echo_of(annotation), value)


def test_each_argument_has_the_codec_of_its_own_parameter() -> None:
    def function(a: int, /, *args: Point, b: UUID, **others: Any) -> Any:
        return a, args, b, others

    definition = TaskDefinition(function, "function", TaskOptions())
    # The names of what cannot be given by keyword are free for `others`.
    given = {"b": UID, "args": (1, 2), "a": {3}, "others": Decimal(1)}
    a, points, b, others = definition.invoke(sent(definition, 1, Point(1), Point(2), **given))
    assert (a, points, b) == (1, (Point(1), Point(2)), UID)
    assert others == {"args": (1, 2), "a": {3}, "others": Decimal(1)}
    with pytest.raises(SerializationError, match=r"argument 'args': a .*object"):
        sent(definition, 1, b=UID, args=object())


async def test_through_a_queue(app: QueueTasks) -> None:
    @app.task()
    async def total(orders: list[Order], by: dict[str, Any]) -> Page[Money]:
        assert by == {"since": (2024, 1)}
        return Page([line for order in orders for line in order.lines], len(orders))

    @app.task()
    async def wrong() -> Point:
        return Point("three")  # type: ignore[arg-type]

    @app.task()
    def untyped(value):  # type: ignore[no-untyped-def]
        return Point(1) if value is None else (value,)

    async with app.worker():
        done = await total.add_task([ORDER], {"since": (2024, 1)}, timeout=120)
        assert done.returning == Page(ORDER.lines, 1)
        ended = await wrong.add_task(timeout=120)
        assert (ended.status, ended.dead) == ("error", "unstorable result")
        assert "Expected `int`, got `str`" in (ended.error or "")
        ended = await untyped.add_task(None, timeout=120)
        assert (ended.status, ended.dead) == ("error", "unstorable result")
        assert "Point would not come back as it is" in (ended.error or "")
        assert exactly((await untyped.add_task({UID}, timeout=120)).returning) == exactly(({UID},))
