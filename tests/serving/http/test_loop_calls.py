"""LoopCalls: every call is made, in its order; the thread that puts one does not wake the loop."""

import asyncio
import threading

from qmix.serving.http.loop_calls import LoopCalls
from tests.support.process import PATIENCE


def test_calls_are_made_in_their_order_and_in_the_loop():
    async def made():
        loop, seen, done = asyncio.get_running_loop(), [], asyncio.Event()
        calls = LoopCalls(loop)

        def put():
            for number in range(10_000):
                calls.put(seen.append, (number, None))
            calls.put(lambda: (seen.append(threading.current_thread()), done.set()))

        thread = threading.Thread(target=put)
        thread.start()
        await asyncio.wait_for(done.wait(), PATIENCE)
        thread.join()
        return seen

    *numbers, where = asyncio.run(made())
    assert numbers == [(number, None) for number in range(10_000)]
    assert where is threading.main_thread()


def test_a_loop_is_woken_once_for_all_that_has_come_and_in_another_thread():
    woken = []

    class Loop:
        def call_soon_threadsafe(self, make):
            woken.append((threading.current_thread(), make))
            called.set()

    called, seen = threading.Event(), []
    calls = LoopCalls(Loop())
    for number in range(3):
        calls.put(seen.append, number)
    assert called.wait(PATIENCE)
    ((thread, make),) = woken
    assert thread is not threading.current_thread()
    make()
    assert seen == [0, 1, 2]
    called.clear()
    calls.put(seen.append, 3)  # nobody comes for it but by a new call
    assert called.wait(PATIENCE)
    assert len(woken) == 2
