"Seeded tiny runs give what they gave; see `golden.py` for how to record them anew"
import json

import golden

TOLERANCE = 0.02  # scores and losses, 0-1; another processor rounds otherwise, and three epochs carry that on

def test_golden_outputs_hold(runs, trained_discs, tmp_path):
    old = json.loads(golden.FILE.read_text(encoding='utf-8'))
    assert old.pop('killed_is_same')  # `test_distill.py` kills a run at every stage
    new = golden.golden(tmp_path, trained_discs, {name: runs(name).out for name in golden.RUNS})
    found = list(golden.differences(old, json.loads(json.dumps(new)), TOLERANCE))
    assert not found, '\n'.join(found)

def test_a_changed_number_or_name_is_told():
    old = dict(names=['a', 'b'], dice=0.5, images=4, masks={'0': 100})
    assert not list(golden.differences(old, old))
    assert list(golden.differences(old, dict(old, dice=0.6), 0.02)) == ['/dice: 0.5 is now 0.6']
    assert list(golden.differences(old, dict(old, images=5), 0.02)) == ['/images: 4 is now 5']
    assert not list(golden.differences(old, dict(old, dice=0.51, masks={'0': 120}), 0.02))
    assert list(golden.differences(old, dict(old, names=['a']), 0.02)) == ["/names: ['a', 'b'] is now ['a']"]
    assert list(golden.differences(old, dict(old, masks={'0': 100, '255': 3}), 0.02)) == ['/masks/255: None is now 3']
