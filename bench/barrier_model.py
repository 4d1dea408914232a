"""Every interleaving of the protocols of kernels/int8_linear_gluon.py and kernels/tickets.py.

    python -m bench.barrier_model      states of each protocol, and what each seeded error breaks

A state is where each agent stands, its barriers or tickets, and what memory holds. Steps of agents
are atomic and memory is sequentially consistent: orders of memory are not in the model (tickets.py
says which fences they need). `explore` goes through all states and returns their number, or raises
Broken with what went wrong first.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

State = TypeVar("State")


class Broken(Exception):  # noqa: N818
    """A protocol that deadlocks, or lets an agent read what is not there."""


def explore(
    first: State, steps: Callable[[State], Iterator[State]], is_end: Callable[[State], bool]
) -> int:
    """Number of states from first on.

    Raises: Broken where `steps` does, or where a state has no next one and is no end.
    """
    known, left = {first}, [first]
    while left:
        state = left.pop()
        following = list(steps(state))
        if not following and not is_end(state):
            raise Broken(f"deadlock: {state}")
        for other in following:
            if other not in known:
                known.add(other)
                left.append(other)
    return len(known)


@dataclass(frozen=True)
class PingPong:
    """A program of int8_linear_gluon: its tiles, those of a column, steps over K, the ring.

    The flags leave one part of the protocol out.
    """

    tiles: int = 5
    tiles_m: int = 3
    steps: int = 2
    stages: int = 3
    has_order: bool = True
    waits_for_column: bool = True
    frees_after_product: bool = True

    def runs(self) -> Iterator[tuple[int, range]]:
        """Number and tiles of each column."""
        for run, start in enumerate(range(0, self.tiles, self.tiles_m)):
            yield run, range(start, min(start + self.tiles_m, self.tiles))

    def copier(self) -> list[tuple[object, ...]]:
        """What the copying warp does, in order."""
        result: list[tuple[object, ...]] = []
        for run, tiles in self.runs():
            if self.waits_for_column:
                result.append(("wait", "w_free", run % 2 ^ 1))
            result.append(("load", "w", run))
            for step in range(tiles.start * self.steps, tiles.stop * self.steps):
                stage = step % self.stages
                result.append(("wait", f"empty{stage}", step // self.stages % 2 ^ 1))
                result.append(("load", stage, step))
        return result

    def group(self, own: int) -> list[tuple[object, ...]]:
        """What a group of warps does, in order."""
        result: list[tuple[object, ...]] = []
        turn = 0
        for run, tiles in self.runs():
            result.append(("wait", "w_full", run % 2))
            for tile in (tile for tile in tiles if tile % 2 == own):
                if self.has_order:
                    result.append(("wait", f"order{own}", turn % 2))
                for k in range(self.steps):
                    step = tile * self.steps + k
                    stage, before = step % self.stages, (step - 1) % self.stages
                    result.append(("wait", f"full{stage}", step // self.stages % 2))
                    result.append(("multiply", stage, step, run))
                    if not self.frees_after_product:
                        result.append(("arrive", f"empty{stage}"))
                    elif k > 0:
                        result += [("retire", 1), ("arrive", f"empty{before}")]
                if self.has_order:
                    result.append(("arrive", f"order{1 - own}"))
                result.append(("retire", 0))
                if self.frees_after_product:
                    result.append(("arrive", f"empty{step % self.stages}"))
                turn += 1
            result.append(("arrive", "w_free"))
        return result

    def explore(self) -> int:
        """States of the program; raises Broken."""
        names = [f"{kind}{s}" for kind in ("empty", "full") for s in range(self.stages)]
        names += ["order0", "order1", "w_full", "w_free"]
        place = {name: i for i, name in enumerate(names)}
        counts = [2 if name == "w_free" else 1 for name in names]
        programs = (self.copier(), self.group(0), self.group(1))
        # Phase of each barrier and arrivals that it still waits for; the first turn is group 0's
        barriers = [(0, count) for count in counts]
        barriers[place["order0"]] = (1, 1)
        # Of w and each stage: what is in it; copies on their way; stage, step of products begun
        empty: frozenset[tuple[int, int]] = frozenset()
        first = ((0, 0, 0), tuple(barriers), (-1,) * (self.stages + 1), empty, ((), ()))

        def arrive(barriers: tuple, name: str) -> tuple:  # type: ignore[type-arg]
            phase, pending = barriers[place[name]]
            after = (phase + 1, counts[place[name]]) if pending == 1 else (phase, pending - 1)
            return (*barriers[: place[name]], after, *barriers[place[name] + 1 :])

        def steps(state):  # type: ignore[no-untyped-def]
            at, barriers, holds, copies, products = state
            for copy in copies:
                cell, value = copy
                now = (*holds[:cell], value, *holds[cell + 1 :])
                name = "w_full" if cell == 0 else f"full{cell - 1}"
                yield at, arrive(barriers, name), now, copies - {copy}, products
            for agent, program in enumerate(programs):
                if at[agent] == len(program):
                    continue
                kind, *rest = program[at[agent]]
                after = (*at[:agent], at[agent] + 1, *at[agent + 1 :])
                if kind == "wait":
                    name, parity = rest
                    if barriers[place[name]][0] % 2 != parity:
                        yield after, barriers, holds, copies, products
                elif kind == "arrive":
                    yield after, arrive(barriers, rest[0]), holds, copies, products
                elif kind == "load":
                    cell = 0 if rest[0] == "w" else 1 + rest[0]
                    for product in (*products[0], *products[1]):
                        if cell in (0, 1 + product[0]):
                            raise Broken(f"{rest} is copied over what a product reads: {product}")
                    if any(copy[0] == cell for copy in copies):
                        raise Broken(f"{rest} is copied while another copy is on its way")
                    # What is in a cell is lost when a copy begins
                    lost = (*holds[:cell], -1, *holds[cell + 1 :])
                    yield after, barriers, lost, copies | {(cell, rest[1])}, products
                elif kind == "multiply":
                    stage, step, run = rest
                    if (holds[1 + stage], holds[0]) != (step, run):
                        raise Broken(f"step {step} reads {holds[1 + stage]} of column {holds[0]}")
                    own = (*products[agent - 1], (stage, step))
                    both = (own, products[1]) if agent == 1 else (products[0], own)
                    yield after, barriers, holds, copies, both
                else:
                    own = products[agent - 1]
                    own = own[len(own) - rest[0] :] if rest[0] else ()
                    both = (own, products[1]) if agent == 1 else (products[0], own)
                    yield after, barriers, holds, copies, both

        ends = tuple(map(len, programs))
        return explore(first, steps, lambda state: state[0] == ends and not state[3])


@dataclass(frozen=True)
class Tickets:
    """A launch of int8_linear_quantized: blocks of rows, tiles and pieces of each.

    resident: programs that the GPU runs at a time; each takes the place of one that ended.
    pieces_first, forgets: seeded errors: pieces are numbered before tiles; how many programs too
      few `leave` counts.
    """

    blocks: int = 2
    tiles: int = 2
    pieces: int = 2
    resident: int = 3
    pieces_first: bool = False
    forgets: int = 0

    def explore(self) -> int:
        """States of the launch; raises Broken."""
        tiles, pieces = self.blocks * self.tiles, self.blocks * self.pieces
        items = [("tile", i % self.blocks) for i in range(tiles)]
        rows = [("piece", i // self.pieces) for i in range(pieces)]
        order = rows + items if self.pieces_first else items + rows
        total = self.tiles + self.pieces - self.forgets
        # Programs not started; those that run, as (item, place); tickets: items, then blocks; done
        first = (len(order), (), 0, (0,) * self.blocks, (0,) * self.blocks)

        def steps(state):  # type: ignore[no-untyped-def]
            waiting, running, drawn, tickets, done = state
            if waiting and len(running) < self.resident:
                yield waiting - 1, tuple(sorted((*running, (-1, 0)))), drawn, tickets, done
            for i, (item, at) in enumerate(running):
                others = (*running[:i], *running[i + 1 :])
                if item < 0:
                    now = tuple(sorted((*others, (drawn, 0))))
                    reset = 0 if drawn == len(order) - 1 else drawn + 1
                    yield waiting, now, reset, tickets, done
                    continue
                kind, block = order[item]

                def replaced(values, value, block=block):  # type: ignore[no-untyped-def]
                    return (*values[:block], value, *values[block + 1 :])

                after = tuple(sorted((*others, (item, at + 1))))
                if kind == "tile" and at == 0:  # stores its tile
                    yield waiting, after, drawn, tickets, replaced(done, done[block] + 1)
                elif kind == "tile":  # arrive
                    yield waiting, others, drawn, replaced(tickets, tickets[block] + 1), done
                elif at == 0:  # wait_for
                    if tickets[block] >= self.tiles:
                        yield waiting, after, drawn, tickets, done
                elif at == 1:  # quantizes
                    if done[block] != self.tiles:
                        raise Broken(f"rows are quantized before their tiles: {state}")
                    yield waiting, after, drawn, tickets, done
                else:  # leave
                    left = 0 if tickets[block] + 1 == total else tickets[block] + 1
                    yield waiting, others, drawn, replaced(tickets, left), done

        def is_end(state) -> bool:  # type: ignore[no-untyped-def]
            if state[0] or state[1]:
                return False
            if state[2] or any(state[3]):
                raise Broken(f"tickets are not zero after the launch: {state}")
            return True

        return explore(first, steps, is_end)


SOUND: tuple[PingPong | Tickets, ...] = (
    PingPong(), PingPong(tiles=6, tiles_m=2, steps=3, stages=2), PingPong(7, 7, 2, 4),
    PingPong(tiles=4, tiles_m=1, steps=2, stages=2),
    *(Tickets(resident=resident) for resident in (1, 2, 3)), Tickets(3, 2, 1, 3),
)  # fmt: skip
SEEDED: tuple[PingPong | Tickets, ...] = (
    PingPong(has_order=False), PingPong(waits_for_column=False),
    PingPong(frees_after_product=False), Tickets(pieces_first=True, resident=2),
    Tickets(forgets=1),
)  # fmt: skip


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for protocol in SOUND:
        print(f"{protocol}: {protocol.explore()} states, sound")
    for protocol in SEEDED:
        try:
            print(f"{protocol}: {protocol.explore()} states, NOT SEEN to be broken")
        except Broken as error:
            print(f"{protocol}: {str(error)[:120]}")


if __name__ == "__main__":
    main()
