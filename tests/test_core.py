"Errors, lookup by name, argument checks, atomic files and the progress bar"
import pickle

import pytest
from conftest import tree

import semisup_seg.core as core
from semisup_seg.core import DatasetError, atomic, check_fractions, check_numbers, check_positive, lookup, progress

def test_dataset_error_lists_its_faults():
    assert str(DatasetError('a.png: broken'))=='a.png: broken' and DatasetError('a.png: broken').faults==['a.png: broken']
    two = DatasetError(['a.png: broken', 'b.png: missing'])
    assert str(two)=='2 faults found:\n- a.png: broken\n- b.png: missing' and isinstance(two, ValueError)
    assert str(pickle.loads(pickle.dumps(two)))==str(two)

def test_lookup_forgives_spelling():
    options = {'U-Net': 1, 'UNet++': 2, 'DeepLabV3+': 3, 'H Flip': None, 'best_one': 5}
    found = {k: lookup(k, options) for k in ('unet', 'U NET', 'u_net', 'unet++', 'deeplabv3', 'DEEPLAB-V3+', 'hflip', 'best one')}
    assert list(found.values())==[1, 1, 1, 2, 3, 3, None, 5]

def test_lookup_lists_what_is_allowed():
    with pytest.raises(ValueError) as e: lookup('xyz', dict(one=1, two=2), 'thing')
    assert str(e.value)=="Unknown thing 'xyz'. Allowed: one, two"
    with pytest.raises(ValueError, match="Unknown name 'oen'. Did you mean 'one'. Allowed: one, two"): lookup('oen', dict(one=1, two=2))
    with pytest.raises(ValueError, match="'number 7'. Allowed: .*…") as e: lookup('numbr7x', {f'number {i}': i for i in range(41)})
    assert str(e.value).endswith('… 41 in all') and str(e.value).count('number ')==1+8

def test_checks_name_the_argument():
    check_numbers(bs=(1, 1), epochs=(0, 0))
    check_positive(lr=1e-3, weight=2)
    check_fractions(share=1, other=0.5)
    for value in (0, -1, 1.0, True, '4', None):
        with pytest.raises(ValueError, match=f'bs is {value!r}; expected a whole number of at least 1'): check_numbers(n=(3, 1), bs=(value, 1))
    for value in (0, -1.5, float('inf'), float('nan'), True, '4', None):
        with pytest.raises(ValueError, match=f'lr is {value!r}; expected a positive number'): check_positive(lr=value)
    for value in (0, 1.1, float('nan'), True, '1', None):
        with pytest.raises(ValueError, match=f'share is {value!r}; expected a number above 0 and at most 1'): check_fractions(share=value)

def test_atomic_keeps_the_old_file_when_the_new_one_fails(tmp_path):
    f = tmp_path/'a.txt'
    f.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic(f) as tmp:
        tmp.write_text('half')
        raise KeyboardInterrupt
    assert tree(tmp_path).keys()=={'a.txt'} and f.read_text()=='old'

def test_progress_shows_the_rate_where_it_can_be_seen(monkeypatch, capsys):
    monkeypatch.setattr(core, 'on_screen', lambda: True)
    assert list(progress(iter('abc'), 3, 'images'))==['a', 'b', 'c']
    assert 'images a second' in capsys.readouterr().out
    monkeypatch.setattr(core, 'on_screen', lambda: False)
    assert list(progress(iter('abc'), 3, 'images'))==['a', 'b', 'c'] and capsys.readouterr().out==''
