"Downloads from a server that misbehaves, archives that are not what they should be, folders that are written whole"
import json, time, zipfile
from pathlib import Path

import pytest
from conftest import pack, tree

from semisup_seg.core import DatasetError
from semisup_seg.data.archives import check_zip, fetch, find_archives, whole_folder, zip_members

@pytest.fixture
def served(server):
    "An archive on `server`"
    return pack(server.root/'a.zip', {'a.txt': bytes(range(256))*40})

@pytest.fixture
def get(server, served, tmp_path):
    "Fetch that archive into `tmp_path/'got'`"
    (tmp_path/'got').mkdir()
    def _get(sha256=None, **kw): return fetch(f'{server.url}/a.zip?download=1', tmp_path/'got/a.zip', sha256, **kw)
    return _get

def left(tmp_path): return sorted(f.name for f in (tmp_path/'got').iterdir())

# --- downloads

def test_a_broken_download_is_resumed(server, served, get):
    server.moods = ['break', 'break', '503']
    assert get().read_bytes()==served.read_bytes()
    size = served.stat().st_size
    first = size//2
    second = first+(size-first)//2
    assert [r for _,r,_ in server.log]==[None, f'bytes={first}-', f'bytes={second}-', f'bytes={second}-']

def test_a_later_call_resumes_too(server, served, get, tmp_path):
    server.moods = ['break', '404']
    with pytest.raises(DatasetError, match='404'): get()
    part = (tmp_path/'got/a.zip.part').stat().st_size
    assert part>0 and left(tmp_path)==['a.zip.part']
    assert get().read_bytes()==served.read_bytes()
    assert server.log[-1][1]==f'bytes={part}-' and left(tmp_path)==['a.zip']

@pytest.mark.parametrize('moods', [['break', 'no range'], ['no size'], ['less', 'less', 'less']])
def test_servers_that_know_less(server, served, get, moods):
    server.moods = moods[:2]
    if moods[0]=='less':
        with pytest.raises(DatasetError, match='cannot be read as a zip'): get()
    else: assert get().read_bytes()==served.read_bytes()

def test_a_part_of_another_file_is_replaced(served, get, tmp_path):
    (tmp_path/'got/a.zip.part').write_bytes(bytes(10**6))
    assert get().read_bytes()==served.read_bytes() and left(tmp_path)==['a.zip']

def test_a_hanging_server_is_asked_again(server, served, get):
    server.moods = ['hang']
    start = time.time()
    assert get(timeout=0.2).read_bytes()==served.read_bytes()
    assert time.time()-start<2.5 and len(server.log)==2

@pytest.mark.parametrize('moods,error', [(['404'], '404'), (['503']*9, '503'), (['nonsense']*9, 'no HTTP'),
    (['more', 'more']*9, r'it broke off at \d+ of \d+ bytes'), (['less'], 'cannot be read as a zip')])
def test_a_failed_download_says_what_to_do(server, get, tmp_path, moods, error):
    server.moods = moods
    with pytest.raises(DatasetError, match=error) as e: get()
    assert server.url in str(e.value) and 'archive=' in str(e.value) and len(server.log)<=5
    assert {*left(tmp_path)}<={'a.zip.part'}

def test_a_server_that_does_not_answer(server, get):
    server.shutdown()
    server.server_close()
    with pytest.raises(DatasetError, match='could not be downloaded.*archive='): get()

def test_a_download_must_have_its_sha256(server, served, get, tmp_path):
    sha = tree(served.parent)['a.zip']
    with pytest.raises(DatasetError, match=f'SHA-256 is {sha}; expected'): get(sha[:-1]+'x')
    assert len(server.log)==1 and left(tmp_path)==[]
    assert get(sha).is_file()

def test_a_file_that_is_there_is_checked_and_not_downloaded(server, get, tmp_path):
    mine = pack(tmp_path/'got/a.zip', {'mine.txt': b'mine'})
    assert get()==mine and server.log==[]
    mine.write_text('no zip')
    with pytest.raises(DatasetError, match='a.zip: cannot be read as a zip archive'): get()

# --- archives

@pytest.mark.parametrize('name', ['../evil.jpg', '/evil.jpg', 'set/../../evil.jpg', '..\\evil.jpg', 'C:\\evil.jpg', 'link'])
def test_an_archive_that_points_outside_is_refused(server, get, tmp_path, name):
    file = pack(server.root/'a.zip', {'good.txt': b'x', name: None if name=='link' else b'x'})
    for f in (get, lambda: check_zip(file)):
        with pytest.raises(DatasetError, match='points out of its folder') as e: f()
        assert repr(name) in str(e.value)
    assert left(tmp_path)==[] and file.exists()

def test_a_damaged_archive_is_refused(served):
    data = bytearray(served.read_bytes())
    data[len(data)//2] ^= 255
    served.write_bytes(data)
    with pytest.raises(DatasetError, match="the member 'a.txt' is damaged"): check_zip(served)
    with pytest.raises(DatasetError, match='none.zip: no such file'): check_zip(served.with_name('none.zip'))

def test_archives_at_hand_or_from_the_web(server, served, tmp_path):
    url = f'{server.url}/a.zip'
    files = {'a.zip': (url, None), 'b.zip': (url, 'no such sha')}
    mine = pack(tmp_path/'my own.zip', {'a': b''})
    assert find_archives('set', {'a.zip': (url, None)}, tmp_path)==[tmp_path/'a.zip'] and len(server.log)==1
    assert find_archives('set', {'a.zip': ('nowhere', 'no such sha')}, tmp_path, str(mine))==[mine]
    assert find_archives('set', files, tmp_path/'www', [url, mine])==[served, mine] and len(server.log)==1
    pack(tmp_path/'b.zip', {'a': b''})
    assert find_archives('set', files, Path('nowhere'), tmp_path)==[tmp_path/'a.zip', tmp_path/'b.zip']
    with pytest.raises(ValueError, match='archive: 1 given; set takes 2: a.zip, b.zip'): find_archives('set', files, tmp_path, mine)

def test_members_that_macos_adds_are_left_out(tmp_path):
    names = ['A/b.PNG', 'A/c.png', '__MACOSX/A/c.png', 'A/._c.png', 'A/d.txt']
    with zipfile.ZipFile(pack(tmp_path/'a.zip', dict.fromkeys(names, b''))) as z: found = zip_members(z, '.png', '.jpg')
    assert [str(f) for f in found]==['A/b.PNG', 'A/c.png']

# --- folders

def test_a_folder_appears_when_it_is_whole(tmp_path):
    def _write(root):
        (root/'a.txt').write_text('a')
        assert not (tmp_path/'deep/set').exists()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): whole_folder(tmp_path/'deep/set', dict(n=1), _write)
    assert [f.name for f in tmp_path.rglob('*')]==['deep']
    (tmp_path/'deep').rmdir()
    (tmp_path/'set').mkdir()
    assert whole_folder(str(tmp_path/'set'), dict(n=1), lambda root: (root/'b').touch())==tmp_path/'set'
    assert tree(tmp_path).keys()=={'set/b', 'set/about.json'} and json.loads((tmp_path/'set/about.json').read_text())==dict(n=1)

def test_a_folder_is_written_once_and_never_over_something_else(tmp_path):
    def _fail(root): raise AssertionError
    path = whole_folder(tmp_path/'set', dict(n=1), lambda root: None)
    assert whole_folder(path, dict(n=1), _fail)==path
    with pytest.raises(DatasetError, match='set: holds something else already'): whole_folder(path, dict(n=2), _fail)
    with pytest.raises(DatasetError, match='about.json: is a file'): whole_folder(path/'about.json', dict(n=1), _fail)
