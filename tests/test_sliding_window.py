"Windows cover an image, and their predictions are merged without a seam"
import numpy as np

from semisup_seg.training.sliding_window import cut_windows, merge_windows, window_starts

def test_windows_cover_and_overlap():
    for window in (16, 33, 64):
        for length in (1, 15, 16, 17, 64, 65, 100, 257):
            s = window_starts(length, window)
            assert s[0]==0 and s==sorted(set(s)) and s[-1]==max(0, length-window), (length, window)
            assert all(b-a<=window*3/4+1 for a,b in zip(s, s[1:])), (length, window)

def test_what_is_cut_comes_back():
    for shape in ((300, 200), (40, 300), (64, 64), (10, 12), (65, 64)):
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        corners,parts = zip(*cut_windows(image, 64))
        assert {p.shape for p in parts}=={(64, 64, 3)}, shape
        maps = list(merge_windows(np.float32(parts).transpose(0, 3, 1, 2), corners, 64, shape))
        assert len(maps)==3 and np.abs(np.stack(maps, -1)-image).max()<0.01, shape

def test_merged_predictions_stay_between_those_of_the_windows():
    corners = [p for p,_ in cut_windows(np.zeros((150, 150, 3), np.uint8), 64)]
    probs = np.random.default_rng(0).random((len(corners), 2, 16, 16)).astype(np.float32)
    for m in merge_windows(probs, corners, 64, (150, 150)):
        assert m.shape==(150, 150)
        assert probs.min()-1e-5<=m.min() and m.max()<=probs.max()+1e-5
