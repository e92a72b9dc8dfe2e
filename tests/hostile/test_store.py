# SPDX-License-Identifier: Apache-2.0
"""A store that was written into by others: every record gets a typed error that says whose it was, and nothing of one
is run. What a group itself says is the shape that is altered here."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eptransport as ept
from eptransport._bootstrap import LocalStore

QUICK = ept.Settings(backend="loopback", timeout_s=0.2)


class GarbledStore(LocalStore):
    """Rank 1 has said `word` in `stage`, and in earlier stages what rank 0 says."""

    def __init__(self, stage: str, word: Any) -> None:
        super().__init__()
        self.stage = stage
        self.word = word

    def get(self, key: str, /) -> bytes:
        if not key.endswith("/1"):
            return super().get(key)
        if key.split("/")[-2] == self.stage:
            return self.word
        said = json.loads(super().get(key[:-1] + "0"))
        if self.stage == "address":
            said["said"]["made"] = None
        return json.dumps(said).encode()

    def check(self, keys: list[str], /) -> bool:
        return super().check([key for key in keys if not key.endswith("/1")])


def refused(stage: str, word: Any) -> ept.EptError:
    with pytest.raises(ept.EptError) as error:
        ept.Group(QUICK, store=GarbledStore(stage, word), rank=0, world_size=2)
    return error.value


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
texts = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode())
errors = st.fixed_dictionaries({"error": json_values}) | st.fixed_dictionaries(
    {"error": st.fixed_dictionaries({"code": json_values, "text": json_values, "peer": json_values})}
)
saids = st.fixed_dictionaries({"said": json_values, "world_size": st.just(2) | json_values})


def right_hello() -> dict[str, Any]:
    return {
        "version": ept.__version__,
        "process": "elsewhere",
        "host": "elsewhere",
        "backend": "loopback",
        "looked": [["loopback", "1", None]],
        "secret": None,
        "made": None,
        "group": "00",
    }


@settings(max_examples=100, deadline=None)
@given(stage=st.sampled_from(["hello", "address"]), word=texts | (errors | saids).map(lambda v: json.dumps(v).encode()))
@example(stage="hello", word=b"[" * 100_000)
@example(stage="hello", word=b'{"said": {}, "world_size": true}')
@example(stage="address", word=b'{"said": {"address": "0x"}, "world_size": 2}')
@example(stage="address", word=b'{"said": {"address": "\xc3\xa9"}, "world_size": 2}')
@example(stage="hello", word=b'{"error": {"code": 1e400, "text": [], "peer": {}}}')
def test_a_garbled_record_is_a_typed_error(stage: str, word: bytes) -> None:
    refused(stage, word)


@settings(max_examples=100, deadline=None)
@given(field=st.sampled_from(sorted(right_hello())), value=json_values, drop=st.booleans())
def test_a_hello_with_one_field_altered_is_a_typed_error_or_a_right_one(field: str, value: Any, drop: bool) -> None:
    hello = {**right_hello(), field: value}
    if drop:
        del hello[field]
    refused("hello", json.dumps({"said": hello, "world_size": 2}).encode())


@settings(max_examples=100, deadline=None)
@given(blob=st.binary(max_size=300))
def test_an_address_that_is_none_is_a_typed_error(blob: bytes) -> None:
    refused("address", json.dumps({"said": {"address": blob.hex()}, "world_size": 2}).encode())


@pytest.mark.parametrize("word", [None, 7, "text", ["a"]])
def test_a_store_that_gives_no_bytes_is_a_typed_error(word: Any) -> None:
    refused("hello", word)


class Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (setattr, (Trap, "sprung", True))


@pytest.mark.parametrize("stage", ["hello", "address"])
def test_nothing_in_the_store_is_unpickled(stage: str) -> None:
    assert pickle.loads(pickle.dumps(Trap())) is None
    assert Trap.sprung, "the trap works"
    Trap.sprung = False
    for word in (pickle.dumps(Trap()), pickle.dumps(Trap()).hex().encode()):
        error = refused(stage, word)
        assert isinstance(error, ept.TransportError)
        assert error.peer == 1
        assert "rank 1" in str(error)
    assert not Trap.sprung


def test_an_error_that_a_rank_said_keeps_its_class_and_says_whose_it_is() -> None:
    word = json.dumps({"error": {"code": int(ept.Code.LIMIT), "text": "no more", "peer": None}}).encode()
    error = refused("hello", word)
    assert isinstance(error, ept.LimitError)
    assert "rank 1" in str(error)
    assert "no more" in str(error)
