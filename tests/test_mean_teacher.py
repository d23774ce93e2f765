"Mean Teacher: its loss, its teacher, and whole runs"
import json
from functools import partial
from math import exp
from types import SimpleNamespace

import pytest, torch
from conftest import NET, OPTIONS, SIZE, Watch, ends_epoch, first_weights, kill_when, same, tree, weights
from fastai.callback.core import Callback
from fastai.learner import Learner
from torch import nn

from semisup_seg.data.folder import unlabeled_files
from semisup_seg.data.loaders import seg_dls
from semisup_seg.distillation.batches import unlabeled_loader
from semisup_seg.distillation.mean_teacher import MeanTeacher, ramp_up
from semisup_seg.distillation.methods import online_training
from semisup_seg.distillation.run import EventLog, read_events
from semisup_seg.training.inference import load_model
from semisup_seg.training.losses import CEDiceLoss

TARGET = 'target_U-Net_test_resnet'

def test_the_weight_of_the_consistency_cost_rises_to_1():
    values = [ramp_up(k/10) for k in range(11)]
    assert values==sorted(values) and values[0]==pytest.approx(exp(-5)) and values[5]==pytest.approx(exp(-1.25)) and values[10]==ramp_up(3)==1

# --- the callback

class Record(Callback):
    "What the loss was given, what it gave, and the weights after each step"
    order = 70
    run_valid = False
    def before_fit(self): self.steps = []
    def after_backward(self):
        given = dict(images=len(self.xb[0]), pred=len(self.pred), y=len(self.y), loss=self.loss_grad.item())
        self.steps.append(SimpleNamespace(**given, labels_alone=self.learn.loss_func(self.pred, self.y).item(), target=self.mean_teacher.target))
    def after_batch(self):
        self.steps[-1].student = [p.detach().clone() for p in self.model.parameters()]
        self.steps[-1].teacher = [p.detach().clone() for p in self.mean_teacher.teacher.parameters()]

def train(path, lr=1e-2, epochs=2, noise=None, **options):
    "A training of a single convolution, which behaves alike in training and in evaluation: its callback and what `Record` saw"
    torch.manual_seed(0)
    learn = Learner(seg_dls(path, SIZE, 2), nn.Conv2d(3, 2, 3, padding=1), CEDiceLoss())
    cb = MeanTeacher(unlabeled_loader(unlabeled_files(path), SIZE, 3), **options)
    if noise: cb.noise = noise
    record = Record()
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=[cb, record])
    return learn, cb, record.steps

def test_the_loss_of_the_labels_sees_labelled_images_alone(trained_discs):
    for step in train(trained_discs)[2]: assert (step.images, step.pred, step.y, len(step.target))==(5, 2, 2, 3)

def test_where_student_and_teacher_agree_nothing_is_added_to_the_loss(trained_discs):
    steps = train(trained_discs, lr=0., noise=nn.Identity())[2]
    assert [s.loss for s in steps]==pytest.approx([s.labels_alone for s in steps], abs=1e-6)

def test_disagreement_is_added_with_its_weight(trained_discs):
    for options in (dict(noise=nn.Identity(), lr=0.1), dict(lr=0.)):  # by other weights, by noise
        last = train(trained_discs, weight=10., **options)[2][-1]
        assert last.loss>last.labels_alone+1e-4, options

def test_the_cost_is_the_squared_difference_of_probabilities_and_its_weight_follows_the_whole_training():
    answer,target = torch.tensor([[[[0.]], [[0.]]]]), torch.tensor([[[[0.9]], [[0.1]]]])  # probabilities 0.5 and 0.5
    cases = [(None, 0, 0, 0, 0.), (None, 7, 1, 5, 0.75), (8, 0, 1, 5, 0.1875), (8, 2, 0, 0, 0.25), (8, 2, 5, 9, 0.9875)]
    for epochs,history,epoch,k,done in cases:
        cb = MeanTeacher(None, weight=3., ramp=0.5, epochs=epochs)
        cb.learn = SimpleNamespace(training=True, history=[None]*history, epoch=epoch, iter=k, n_iter=10, n_epoch=2, loss_grad=torch.tensor(1.))
        cb.answer,cb.target = answer,target
        cb.after_loss()
        assert cb.learn.loss_grad.item()==pytest.approx(1+3*ramp_up(done/0.5)*0.16), (epochs, history, epoch, k)
        assert cb.learn.loss==cb.learn.loss_grad

def test_the_teacher_is_the_moving_average_of_the_student_and_is_what_is_left(trained_discs):
    learn,cb,steps = train(trained_discs, epochs=6, decay=0.4)
    assert len(steps)==12
    for k in range(1, 12):
        decay = min(0.4, (k+1)/(k+10))
        for before,student,teacher in zip(steps[k-1].teacher, steps[k].student, steps[k].teacher):
            assert torch.allclose(teacher, before*decay+student*(1-decay), atol=1e-6), k
    assert all(torch.equal(a, b) for a,b in zip(learn.model.parameters(), steps[-1].teacher))
    assert not any(p.requires_grad for p in cb.teacher.parameters())

def test_a_restored_teacher_goes_on_averaging(trained_discs):
    learn,cb,_ = train(trained_discs)
    new = MeanTeacher(None)
    new.learn = learn
    new.before_fit()
    new.load_state_dict(cb.state_dict())
    new.learn.training = True
    nn.init.zeros_(learn.model.weight)
    new.after_batch()
    assert new.steps==5 and not torch.equal(new.teacher.weight, cb.teacher.weight)
    assert torch.allclose(new.teacher.weight, cb.teacher.weight*5/14, atol=1e-6)

def test_weights_and_shares_out_of_range_are_refused():
    for bad,message in ((dict(weight=0), 'weight is 0'), (dict(ramp=0), 'ramp is 0'), (dict(ramp=1.5), 'ramp is 1.5'), (dict(decay=2), 'decay is 2')):
        with pytest.raises(ValueError, match=message): MeanTeacher(None, **bad)

# --- whole runs

def go(data, out, **options): return online_training('Mean Teacher', NET, data, out, **{**OPTIONS, **options})

@pytest.fixture(scope='module')
def done(trained_discs, tmp_path_factory):
    "A finished run, and what it did"
    out = tmp_path_factory.mktemp('mean teacher')/'out'
    with Watch().watching() as seen: res = go(trained_discs, out)
    return out, res, seen

def test_a_run_takes_as_many_steps_as_all_images_need_and_reports(done):
    out,res,seen = done
    report = json.loads((out/'report.json').read_text())
    assert report['settings']['training']['target']['steps']==4 and report['settings']['method']=='Mean Teacher'
    assert list(res.report.scores)==['target'] and res.report.split=='test' and res.annotations is None
    assert set(tree(out))=={f'{TARGET}.pth', f'{TARGET}.json', 'report.json', 'report.html', 'run.json', 'events.jsonl'}

def test_each_image_is_decoded_once_and_test_images_pass_once_through_the_student(done, trained_discs):
    out,_,seen = done
    files = sorted(f for d in ('Images', 'unlabeled_images') for f in (trained_discs/d).rglob('*.png') if f.parent.name!='test')
    reads = sorted(f for m,f in seen.reads if m=='semisup_seg.data.loaders' and f.parent.name!='test')
    assert reads==files and seen.scored==2
    assert [network for network,_ in seen.passes]==[first_weights(load_model(out/f'{TARGET}.pth'))]*2

def test_the_ramp_is_that_of_the_whole_training(monkeypatch, untrained, trained_discs, tmp_path):
    go(trained_discs, tmp_path/'out', epochs=7, options=dict(decay=0.8, weight=2, ramp=0.5, share=0.75))
    cb = next(cb for cb in untrained[0].cbs if isinstance(cb, MeanTeacher))
    assert (cb.decay, cb.weight, cb.ramp, cb.epochs, cb.loader.bs)==(0.8, 2, 0.5, 7, 3)
    assert untrained[0].steps==2  # an epoch, as for a batch of labelled images alone

def test_a_run_that_is_killed_in_its_training_ends_as_if_it_had_not_been(done, trained_discs, tmp_path):
    whole,res,_ = done
    out = tmp_path/'out'
    kill_when(EventLog, 'emit', partial(ends_epoch, TARGET, 2), go, trained_discs, out)
    assert not (out/f'{TARGET}.pth').exists() and not (out/'report.json').exists()
    again = go(trained_discs, out)
    assert same(weights(out), weights(whole)) and again.report.target==res.report.target
    assert [(e['event'], e['epoch']) for e in read_events(out) if 'epoch' in e]==[('epoch', 1), ('resumed', 1), ('epoch', 2)]
    with Watch().watching() as seen: go(trained_discs, out)
    assert not seen.fits and not seen.scored

def test_another_seed_gives_other_weights(done, trained_discs, tmp_path):
    go(trained_discs, tmp_path/'out', seed=1)
    assert not same(weights(tmp_path/'out'), weights(done[0]))
