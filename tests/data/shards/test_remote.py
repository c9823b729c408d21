"""Remote shards give the samples that local ones give; the cache keeps its bound and its readers, whoever dies meanwhile."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from shard_files import captions, jpeg, keys, three, write_shard
from small_runs import small, take

from openvision3.data.batches import BatchPlan, TextShape, TrainingBatches
from openvision3.data.images import ImageError
from openvision3.data.labelled import read_classes
from openvision3.data.names import DataOptions, open_source
from openvision3.data.openmoji import EmojiSource
from openvision3.data.problems import count_reasons
from openvision3.data.shards import remote, tars
from openvision3.data.shards.check import check_shard, write_index
from openvision3.data.shards.index import Stamp, index_path, read_head
from openvision3.data.shards.remote import ShardCache, expand_remote
from openvision3.data.shards.source import choose_lanes
from openvision3.data.sources import MixedSource
from openvision3.data.text import TextTokenizer
from openvision3.distributed import Ranks
from openvision3.settings import load_config
from openvision3.train.pretrain import pretrain
from openvision3.train.run import _resumed

fsspec = pytest.importorskip("fsspec")
pytest.importorskip("aiohttp")
pytest.importorskip("fcntl")


class Server(ThreadingHTTPServer):
    """A folder over HTTP. `breaks[name]` is how often a GET of it ends in the middle; `gets` counts them."""

    daemon_threads = True

    def __init__(self, folder: Path):
        self.folder, self.breaks, self.gets, self.slow = folder, Counter(), Counter(), 0.0
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args, **named):
        super().__init__(*args, directory=str(args[2].folder), **named)

    def log_message(self, *_):
        pass

    def copyfile(self, source, outputfile):
        name = Path(self.path).name
        self.server.gets[name] += 1
        data = source.read()
        if self.server.breaks[name] > 0:
            self.server.breaks[name] -= 1
            outputfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        for start in range(0, len(data), 4096):
            outputfile.write(data[start : start + 4096])
            outputfile.flush()
            time.sleep(self.server.slow)


@pytest.fixture
def server(tmp_path):
    for i in range(4):
        write_shard(tmp_path / "served" / f"{i:05d}.tar", three(3 * i))
    serving = Server(tmp_path / "served")
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield serving
    serving.shutdown()
    serving.server_close()


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE", 0.01)


def shard_size(server) -> int:
    return (server.folder / "00000.tar").stat().st_size


def opened(server, tmp_path, shards=4, **options):
    names = (f"{server.url}/{{00000..{shards - 1:05d}}}.tar",)
    for url in expand(names[0]):
        made = write_index(url, str(tmp_path / "index"))
        assert not made.error, made.error
    return open_source(names, DataOptions(**{"index": str(tmp_path / "index"), "cache": str(tmp_path / "cache"), "cache_gb": 1.0} | options))


def expand(name):
    from openvision3.data.names import find

    return find(name).tars


def used(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".tar")) if folder.exists() else 0


def test_shards_over_http_are_read_as_local_ones(server, tmp_path):
    source = opened(server, tmp_path)
    local = open_source((f"{server.folder}/*.tar",))
    assert captions(source) == captions(local)
    assert [k.split("/")[-2:] for k in keys(source)] == [k.split("/")[-2:] for k in keys(local)]
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]
    assert torch.equal(source.crop(5, 16, generators[0])[0], local.crop(5, 16, generators[1])[0])
    assert set(server.gets.values()) == {2}, "once for the index, once for the cache"


def test_any_fsspec_place_will_do(tmp_path):
    memory = fsspec.filesystem("memory")
    for i in range(2):
        path = write_shard(tmp_path / f"{i}.tar", three(3 * i))
        memory.pipe(f"/shards/{i}.tar", Path(path).read_bytes())
    try:
        assert expand_remote("memory://shards/*.tar") == expand_remote("memory://shards") == ["memory:///shards/0.tar", "memory:///shards/1.tar"]
        for url in expand("memory://shards/{0,1}.tar"):
            assert write_index(url, str(tmp_path / "index")).written
            assert not write_index(url, str(tmp_path / "index")).written
            assert check_shard(url, decode=True).usable == 3
        source = open_source(("memory://shards/{0,1}.tar",), DataOptions(index=str(tmp_path / "index"), cache=str(tmp_path / "cache"), cache_gb=1))
        assert captions(source) == [(f"caption {i}",) for i in range(6)]
    finally:
        memory.rm("/shards", recursive=True)


def test_what_is_missing_is_named_before_a_byte_is_fetched(server, tmp_path):
    url = f"{server.url}/00000.tar"
    with pytest.raises(ValueError, match=r"00000\.tar has no index; write it with: openvision3 data index SHARDS --index FOLDER"):
        open_source((url,), DataOptions(cache=str(tmp_path / "cache"), cache_gb=1))
    with pytest.raises(ValueError, match=r"fetched whole: name a folder with --cache"):
        opened(server, tmp_path, cache="")
    with pytest.raises(ValueError, match=r"cache_gb 2e-05 is too small: 4 shards are read at a time, the largest of .* at least .* GB are needed"):
        opened(server, tmp_path, cache_gb=2e-5)
    with pytest.raises(ValueError, match=r"no-such-place://x/\*\.tar cannot be opened"):
        open_source(("no-such-place://x/*.tar",))
    assert not (tmp_path / "cache").exists()


def test_a_fetch_that_breaks_off_is_tried_again_and_then_reported(server, tmp_path, monkeypatch):
    source = opened(server, tmp_path)
    server.gets.clear()
    server.breaks["00000.tar"] = remote.ATTEMPTS - 1
    assert source.captions(0) == ("caption 0",)
    assert server.gets["00000.tar"] == remote.ATTEMPTS
    server.breaks["00001.tar"] = 99
    for _ in range(3):
        with pytest.raises(ImageError, match=r"00001\.tar could not be fetched, tried 3 times") as caught:
            source.captions(3)
        assert caught.value.reason == "unreadable"
    assert server.gets["00001.tar"] == remote.ATTEMPTS, "what failed is not asked for again at once"
    assert used(tmp_path / "cache") == shard_size(server), "nothing half fetched stays"
    server.breaks.clear()
    monkeypatch.setattr(remote, "FORGET", 0.0)
    assert source.captions(3) == ("caption 3",)


def test_a_shard_that_is_gone_or_another_now_is_named_and_the_others_go_on(server, tmp_path):
    source = opened(server, tmp_path)
    (server.folder / "00001.tar").unlink()
    write_shard(server.folder / "00002.tar", three() | three(70))
    for index, reason in ((3, "vanished"), (6, "changed")):
        with pytest.raises(ImageError) as caught:
            source.captions(index)
        assert caught.value.reason == reason
    assert source.captions(9) == ("caption 9",)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_a_shard_that_vanished(server, tmp_path, workers):
    source = opened(server, tmp_path)
    (server.folder / "00003.tar").unlink()
    words = TextTokenizer.train(["caption one two three"], 50)
    made = TrainingBatches(source, words, BatchPlan(TextShape(8, 8), size=16, batch=4, seed=0), workers=workers)
    iterator = made.from_step(0)
    batches = list(islice(iterator, 6))
    iterator.close()
    assert all(len(batch["images"]) == 4 for batch in batches)
    assert count_reasons(made.problems) == {"vanished": 3}


def test_classes_of_remote_shards_are_read_with_their_images(server, tmp_path):
    for shard in range(4):
        members = {f"{3 * shard + n:09d}.{kind}": data for n in range(3) for kind, data in (("cls", b"%d" % n), ("jpg", jpeg()))}
        write_shard(server.folder / f"{shard:05d}.tar", members)
    source = opened(server, tmp_path)
    server.gets.clear()
    with pytest.raises(ValueError, match="remote shards are not searched for their classes; name a file of class names with --classes"):
        read_classes(source)
    classes = read_classes(source, classes="3")
    assert not server.gets
    made = TrainingBatches(source, None, BatchPlan(TextShape(0, 0), size=16, batch=4, seed=0), labels=classes)
    for step, batch in enumerate(take(made, 0, 6)):
        assert batch["labels"].tolist() == [made.index(4 * step + row) % 3 for row in range(4)]
    assert set(server.gets.values()) == {1}

    place = index_path(f"{server.url}/00000.tar", str(tmp_path / "index"))
    listed = read_head(place).load()
    replace(listed, offsets=listed.offsets[:, :3].copy(), sizes=listed.sizes[:, :3].copy()).save(place)  # as older versions wrote it
    with pytest.raises(ValueError, match=r"lists no \.cls members.*older version: write it again with openvision3 data index SHARDS --index FOLDER --again"):
        opened(server, tmp_path, shards=1).value(0)


def test_all_gone_stops_with_the_reason(server, tmp_path):
    source = opened(server, tmp_path)
    for path in server.folder.iterdir():
        path.unlink()
    made = TrainingBatches(source, TextTokenizer.train(["a caption"], 50), BatchPlan(TextShape(8, 8), size=16, batch=4, seed=0))
    with pytest.raises(ValueError, match="256 samples in a row cannot be used, the last because of: vanished"):
        next(made.from_step(0))


def test_the_order_of_remote_shards_spares_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "WINDOW", 2)
    monkeypatch.setattr("openvision3.data.shards.source.WINDOW", 2)
    source = opened(server, tmp_path, cache_gb=2.5 * shard_size(server) / 1e9)
    server.gets.clear()
    for mixed in (source, MixedSource([source, EmojiSource(())])):
        order = mixed.order(0, 0)
        assert sorted(order.place(i)[0] for i in range(12)) == list(range(12))
    for position in range(12):
        source.captions(source.order(0, 0).place(position)[0])
    assert set(server.gets.values()) == {1}


def test_lanes_are_a_function_of_the_batch_and_of_remote_shards_only(server, tmp_path):
    source = opened(server, tmp_path)
    for remote_source in (source, MixedSource([source, EmojiSource(())])):
        assert [choose_lanes(remote_source, batch) for batch in (1024, 120, 6, 17)] == [16, 15, 6, 1]
    assert choose_lanes(source, 64, lanes=4) == 4
    assert choose_lanes(open_source((f"{server.folder}/*.tar",)), 1024, lanes=4) == 1


def test_more_lanes_than_the_cache_holds_shards_are_refused_unless_other_machines_read_them(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "WINDOW", 2)
    source = opened(server, tmp_path, cache_gb=2.5 * shard_size(server) / 1e9)
    with pytest.raises(ValueError, match=r"cache_gb .* is too small: 4 shards are read at a time"):
        choose_lanes(source, 8, lanes=4)
    assert choose_lanes(source, 8, lanes=4, machines=2) == 4


def test_each_machine_fetches_the_shards_of_its_rows_and_batches_are_those_of_one_process(server, tmp_path):
    words = TextTokenizer.train(["caption one two three"], 50)

    def made(name, **options):
        source = opened(server, tmp_path, cache=str(tmp_path / name))
        server.gets.clear()
        batches = TrainingBatches(source, words, BatchPlan(TextShape(8, 8), size=16, batch=4, seed=0, lanes=4), **options)
        batches.check_room()
        return [batches[step][0] for step in range(3)], set(server.gets)

    whole, all_shards = made("one")
    (first, some), (second, others) = (made(f"machine {rank}", ranks=Ranks(rank, 2)) for rank in (0, 1))
    assert len(all_shards) == 4
    assert len(some) == len(others) == 2
    assert some | others == all_shards
    for step, batch in enumerate(whole):
        assert torch.equal(batch["images"], torch.cat([first[step]["images"], second[step]["images"]]))


# --- the cache ------------------------------------------------------------------------------------------------------------


def test_what_was_read_longest_ago_is_dropped_first_and_the_bound_holds(server, tmp_path):
    size = shard_size(server)
    cache = ShardCache(tmp_path / "cache", 2.5 * size / 1e9)

    def read(i):
        with cache.reading(f"{server.url}/{i:05d}.tar", Stamp(size)):
            assert used(tmp_path / "cache") <= cache.limit
            time.sleep(0.01)

    for i in (0, 1, 0, 2, 0):
        read(i)
    assert server.gets == {"00000.tar": 1, "00001.tar": 1, "00002.tar": 1}
    read(1)
    assert server.gets["00001.tar"] == 2, "it had made room for the third"


def test_a_shard_that_is_being_read_is_not_dropped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    size = shard_size(server)
    cache = ShardCache(tmp_path / "cache", 2.5 * size / 1e9)
    with ExitStack() as held:
        for i in (0, 1):
            held.enter_context(cache.reading(f"{server.url}/{i:05d}.tar", Stamp(size)))
        with pytest.raises(ImageError, match=r"no room for .*00002\.tar in the cache .*: all of it is in use; raise cache_gb"):
            held.enter_context(cache.reading(f"{server.url}/00002.tar", Stamp(size)))
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    cache._failed.clear()
    with cache.reading(f"{server.url}/00002.tar", Stamp(size)) as descriptor:
        assert os.fstat(descriptor).st_size == size


def test_a_shard_larger_than_the_cache_says_so(server, tmp_path):
    size = shard_size(server)
    with pytest.raises(ImageError, match="more than the whole cache"), ShardCache(tmp_path, size / 2e9).reading(f"{server.url}/00000.tar", Stamp(size)):
        pass
    with pytest.raises(ValueError, match="cache_gb 0 must be more than 0"):
        ShardCache(tmp_path, 0)


def test_a_full_disk_leaves_nothing_behind_and_is_named(server, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remote.os, "pwrite", full)
    size = shard_size(server)
    with (
        pytest.raises(ImageError, match=r"cannot be kept in the cache .*No space left"),
        ShardCache(tmp_path / "c", 1).reading(f"{server.url}/00000.tar", Stamp(size)),
    ):
        pass
    assert used(tmp_path / "c") == 0


def read_many(url: str, size: int, folder: str, limit: float, seed: int, results) -> None:
    cache = ShardCache(folder, limit)
    generator = torch.Generator().manual_seed(seed)
    worst = 0
    try:
        for _ in range(30):
            number = int(torch.randint(4, (1,), generator=generator))
            with cache.reading(f"{url}/{number:05d}.tar", Stamp(size)) as descriptor:
                worst = max(worst, used_now(folder))
                expected = (f"{3 * number:09d}.jpg").encode()
                assert os.pread(descriptor, 13, 0) == expected
                assert len(os.pread(descriptor, size + 1, 0)) == size
        results.put(worst)
    except BaseException as error:
        results.put(repr(error))


def used_now(folder: str) -> int:
    total = 0
    for entry in os.scandir(folder):
        if entry.name.endswith(".tar"):
            try:
                total += entry.stat().st_size
            except FileNotFoundError:
                continue
    return total


def test_several_processes_share_a_cache_that_holds_two_of_four_shards(server, tmp_path):
    size = shard_size(server)
    limit = 2.5 * size / 1e9
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=read_many, args=(server.url, size, str(tmp_path / "cache"), limit, seed, results)) for seed in range(4)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert all(isinstance(worst, int) and worst <= limit * 1e9 for worst in found), found
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".") and p.name.endswith(".tar")]


def test_a_process_killed_while_it_fetches_holds_up_nobody_and_leaves_no_half_shard(server, tmp_path):
    for path in server.folder.iterdir():
        path.unlink()
    write_shard(server.folder / "big.tar", {f"{i}.jpg": jpeg() * 200 for i in range(10)})
    write_shard(server.folder / "other.tar", {f"{i}.jpg": jpeg() * 200 for i in range(10)})
    size = (server.folder / "big.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 1.5 * size / 1e9)
    server.slow = 0.01

    def fetch():
        with cache.reading(f"{server.url}/big.tar", Stamp(size)):
            pass

    child = multiprocessing.get_context("fork").Process(target=fetch)
    child.start()
    deadline = time.monotonic() + 60
    while not server.gets["big.tar"] and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert [p.name.startswith(".") for p in (tmp_path / "cache").glob("*.tar")] == [True], "it died in the middle"
    server.slow = 0.0
    with cache.reading(f"{server.url}/other.tar", Stamp(size)):
        assert used(tmp_path / "cache") == size, "what the dead one left made room"
    with cache.reading(f"{server.url}/big.tar", Stamp(size)) as descriptor:
        assert os.pread(descriptor, size, 0) == (server.folder / "big.tar").read_bytes()


@pytest.mark.parametrize("ending", ["/*.tar", "/part-*/[0-9].tar", "", "/"])
def test_what_cannot_be_listed_names_an_address_that_can_be(ending, monkeypatch):
    monkeypatch.setattr(remote, "filesystem", lambda url: (SimpleNamespace(glob=lambda path: 1 / 0), url))
    with pytest.raises(ValueError, match=r"name the shards, such as hf://datasets/x/y/\{00000\.\.00099\}\.tar$"):
        expand_remote(f"hf://datasets/x/y{ending}")


# --- a run ----------------------------------------------------------------------------------------------------------------


def test_a_run_records_its_lanes_and_goes_on_with_them_and_one_from_before_goes_on_without(server, tmp_path):
    opened(server, tmp_path)  # writes the indexes
    places = {"data": (f"{server.url}/{{00000..00003}}.tar",), "index": str(tmp_path / "index"), "cache": str(tmp_path / "cache")}
    config = small(tmp_path, "run", steps=1, eval_every=0, batch=6, **places)
    pretrain(config, "tiny")
    path = tmp_path / "run" / "config.json"
    assert json.loads(path.read_text())["lanes"] == 6
    before = load_config(type(config), path)
    assert _resumed(before, config, tmp_path / "run").lanes == 6
    config.lanes = 3
    with pytest.raises(ValueError, match=r"lanes was 6 when .* was started and cannot become 3"):
        _resumed(before, config, tmp_path / "run")
    config.lanes, config.resume = 0, True
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "lanes"}))
    assert pretrain(config, "tiny").training.config.lanes == 1
