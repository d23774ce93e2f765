"""Time every network and the same one from another package alternately, in one process.

    pip install -e '.[bench]'
    python benchmarks/networks.py

writes `semisup_seg/speeds.csv`, which the table of networks and the benchmark's notebook read."""
import argparse, csv, os, platform, statistics, time
from pathlib import Path

import segmentation_models_pytorch as smp, torch
import torch.nn.functional as F

from semisup_seg.models.core import build_model, check_request, networks

COLUMNS = 'network', 'backbone', 'pass', 'channels_last', 'seconds', 'other', 'seconds_other', 'ratio', 'rounds', 'machine'

def _cv(name):
    def _build(size):
        from pytorchcv.model_provider import get_model
        return get_model(name, num_classes=2, in_size=(size, size))
    return 'pytorchcv', _build

def _smp(model): return 'segmentation_models_pytorch', lambda size: model('tu-resnet50', encoder_weights=None, classes=2)

def _monai(size):
    from monai.networks.nets import BasicUNet
    return BasicUNet(2, 3, 2, features=(64, 128, 256, 512, 1024, 64), act='relu', norm='batch', upsample='deconv')

PEERS = {'CGNet': _cv('cgnet_cityscapes'), 'FPENet': _cv('fpenet_cityscapes'), 'LEDNet': _cv('lednet_cityscapes'), 'U-Net': ('monai', _monai),
    'DeepLabV3+': _smp(smp.DeepLabV3Plus), 'MANet': _smp(smp.MAnet), 'PAN': _smp(smp.PAN)}

def forward(model, x):
    "Seconds for the logits of `x` in evaluation"
    model.eval()
    start = time.perf_counter()
    with torch.inference_mode(): model(x)
    return time.perf_counter()-start

def training(model, x):
    "Seconds for logits, loss and gradients of `x` in training"
    model.train().zero_grad()
    y = torch.zeros(x.shape[0], *x.shape[2:], dtype=torch.long)
    start = time.perf_counter()
    F.cross_entropy(model(x), y).backward()
    return time.perf_counter()-start

def time_alternately(
    run,      # `forward` or `training`
    models,   # One or two
    x,        # Batch
    budget,   # Seconds
):
    "Times of each model over as many rounds as fit in `budget`, at least five; the order alternates"
    once = sum(run(m, x) for m in models)
    rounds = max(5, min(30, int(budget/once)))
    times = [[] for _ in models]
    for i in range(rounds):
        order = list(range(len(models)))
        if i%2==0: order.reverse()
        for k in order: times[k].append(run(models[k], x))
    return times

def measure(name, size, bs, budget):
    "The rows of one network"
    other,peer = PEERS.get(name, ('', None))
    ours = build_model(name)
    models = [ours, peer(size)] if peer else [ours]
    machine = f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}'
    for channels_last in (True, False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        x = torch.rand(bs, 3, size, size).contiguous(memory_format=layout)
        models = [m.to(memory_format=layout) for m in models]
        for run in (forward, training):
            times = time_alternately(run, models, x, budget)
            seconds = [statistics.median(t)/bs for t in times]
            row = dict.fromkeys(COLUMNS, '') | dict(network=name, backbone=ours.config['backbone'] or '', machine=machine)
            row |= {'pass': run.__name__, 'channels_last': 'yes' if channels_last else 'no'}
            row |= dict(seconds=f'{seconds[0]:.5f}', other=other, rounds=len(times[0]))
            if peer:
                ratio = statistics.median(a/b for a,b in zip(*times))
                row |= dict(seconds_other=f'{seconds[1]:.5f}', ratio=f'{ratio:.3f}')
            yield row

def write_rows(file, rows):
    "Write the table at once, so that an interrupted run leaves the old one"
    new = file.with_suffix('.new')
    with new.open('w', newline='', encoding='utf-8') as f:
        w = csv.DictWriter(f, COLUMNS)
        w.writeheader()
        w.writerows(rows)
    os.replace(new, file)

def main():
    "Measure and write"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--networks', nargs='+', default=[n.name for n in networks.values() if not n.more], help='which ones; their rows are replaced, others stay')
    p.add_argument('--size', type=int, default=256, help='side of the images, pixels (256)')
    p.add_argument('--bs', type=int, default=2, help='images per batch (2)')
    p.add_argument('--budget', type=float, default=8, help='seconds for each comparison (8)')
    p.add_argument('--out', type=Path, default=Path(__file__).parent.parent/'semisup_seg/speeds.csv')
    o = p.parse_args()
    rows = list(csv.DictReader(o.out.open(encoding='utf-8'))) if o.out.exists() else []
    for name in [check_request(n)[0].name for n in o.networks]:
        rows = [r for r in rows if r['network']!=name]
        for r in measure(name, o.size, o.bs, o.budget):
            rows.append(r)
            print('  '.join(str(v) for v in r.values()), flush=True)
        write_rows(o.out, rows)

if __name__=='__main__':
    try: main()
    except ModuleNotFoundError as e: raise SystemExit(f"{e}; the packages to compare with come by: pip install -e '.[bench]'")
