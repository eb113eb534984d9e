"""Streams: in order, and what their ends see when they break, are cut or lose a process."""

import asyncio
from random import Random
from typing import Any

import pytest

from cluster.simulation.loop import ProcessLoop, Timeline
from cluster.simulation.network import (
    Delays,
    End,
    Network,
    Place,
    StreamBrokenError,
    StreamEndedError,
)


class Net:
    """Two processes; "server" keeps the ends of what it accepts, and reads them."""

    def __init__(self, delays: Delays = Delays(slow_share=0.3)) -> None:  # noqa: B008
        self.timeline = Timeline()
        self.network = Network(self.timeline, Random(1), delays, lambda end, message: None)
        self.client, self.server = (self._place(name) for name in ("client", "server"))
        self.got: list[Any] = []
        self.network.listen(self.server, "server:1", self._accept)

    def _place(self, name: str) -> Place:
        place = Place(name, ProcessLoop(self.timeline))
        self.network.places[name] = place
        return place

    def _accept(self, end: End) -> None:
        asyncio.get_running_loop().create_task(self._read(end))

    async def _read(self, end: End) -> None:
        try:
            while True:
                self.got.append(await end.receive())
        except ConnectionError as error:
            self.got.append(type(error))

    def dial(self) -> End:
        task = self.client.loop.spawn(self.network.dial(self.client, "server:1", "session"))
        while not task.done():
            self.timeline.step()
        return task.result()

    def play(self, s: float = 100.0) -> None:
        until = self.timeline.now_s + s
        self.timeline.call_at(until, lambda: None)
        while self.timeline.now_s < until and self.timeline.step():
            pass


def test_messages_of_a_stream_keep_their_order_and_then_comes_the_end():
    net = Net()
    end = net.dial()
    for number in range(50):
        end.send(number)
    end.close()
    net.play()
    assert net.got == [*range(50), StreamEndedError]


def test_a_break_loses_what_is_on_the_way():
    net = Net()
    end = net.dial()
    net.play(1.0)
    net.network.break_stream(end)
    net.play()
    assert net.got == [StreamBrokenError]
    with pytest.raises(StreamBrokenError):
        end.send("late")


def test_a_cut_that_heals_delays_and_loses_nothing():
    net = Net()
    end = net.dial()
    net.play(1.0)
    net.network.cut("client", "server")
    end.send("held back")
    net.play(1.0)
    assert net.got == []
    net.network.heal("client", "server")
    net.play()
    assert net.got == ["held back"]


def test_a_cut_that_stays_breaks_streams_on_both_sides():
    net = Net(Delays(keepalive_s=2.0))
    end = net.dial()
    net.play(0.5)
    net.network.cut("client", "server")
    end.send("lost")
    net.play(5.0)
    assert net.got == [StreamBrokenError]
    assert end.closed


def test_whoever_is_connected_to_a_process_that_dies_hears_of_it_and_nobody_dials_it():
    net = Net()
    end = net.dial()
    net.play(1.0)
    net.server.loop.die()
    net.network.gone(net.server)
    net.play()
    assert end.closed
    task = net.client.loop.spawn(net.network.dial(net.client, "server:1", "session"))
    net.play()
    assert isinstance(task.exception(), ConnectionRefusedError)
