"""The ledger counts lengths of frames and hands the frames on."""

from pathlib import Path

from thinwire.wire import Frame, Ledger, Stale, encode


def test_both_ways_are_counted_apart_by_client() -> None:
    ledger = Ledger()
    ledger.down(1, b"abc")
    ledger.down(2, b"abcd")
    ledger.up(1, b"a")
    assert (ledger.sent, ledger.received) == ({1: 3, 2: 4}, {1: 1})
    assert (ledger.bytes_down, ledger.bytes_up) == (7, 1)


def test_a_new_ledger_is_empty_and_its_own() -> None:
    Ledger().down(1, b"abc")
    assert (Ledger().bytes_down, Ledger().bytes_up) == (0, 0)
    assert Ledger().sent == {}


def test_a_frame_sent_twice_is_counted_twice() -> None:
    ledger, frame = Ledger(), encode(Stale(None))
    for _ in range(2):
        assert ledger.down(0, frame) is frame
        assert ledger.up(0, frame) is frame
    assert ledger.bytes_down == ledger.bytes_up == 2 * len(frame)


def test_a_frame_in_a_file_counts_with_the_size_of_the_file() -> None:
    ledger = Ledger()
    ledger.up(3, Frame.in_file(Path("never opened"), 2**40))
    assert ledger.received == {3: 2**40}
