"The pieces of a recipe, each by itself and together"
import dataclasses

import pytest, torch
from conftest import SIZE
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

import semisup_seg.distillation.recipe as R
from semisup_seg.annotation.records import AnnotationRecord, Annotations
from semisup_seg.data.loaders import seg_dls, standard_augment
from semisup_seg.distillation.batches import BatchMixer, CutMix, HardLabels, MixedBatches, StrongAugment
from semisup_seg.distillation.recipe import EMA, Recipe, TopReliable, get_recipe, recipes
from semisup_seg.training.learner import seg_learner

def row(i, agreement, used=True, mask='m.png'): return AnnotationRecord(f'{i}.png', mask, confidence=0.5, agreement=agreement, used=used)

# --- TopReliable

def test_top_reliable_keeps_the_upper_end_of_the_ranking(tmp_path):
    rows = [row(i, a) for i,a in enumerate((0.5, 0.9, 0.1, 0.7))]
    for share,kept in ((0.01, 1), (0.25, 1), (0.5, 2), (0.75, 3), (1, 4), (1.0, 4)):
        res = TopReliable(share).select(Annotations(tmp_path, rows, []))
        assert {r.image for r in res.rows if r.used}=={f'{i}.png' for i in [1, 3, 0, 2][:kept]}, share
        assert all(r.used for r in rows) and len(res)==4

def test_top_reliable_does_not_bring_back_what_was_rejected_or_unread(tmp_path):
    rows = [row(0, 0.9, used=False), row(1, 0.8), row(2, None, used=False, mask='')]
    assert [r.used for r in TopReliable(1.).select(Annotations(tmp_path, rows, [])).rows]==[False, True, False]

# --- EMA

def small(path): return seg_learner(seg_dls(path, SIZE, 2, epoch_len=8), 'U-Net', 'test_resnet')

def first_weights(learn): return next(learn.model.parameters()).detach().clone()

def train(learn, epochs, lr, cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, lr, cbs=cbs)

def test_ema_is_the_running_mean_of_the_weights(trained_discs):
    class Follow(Callback):
        order = 54
        run_valid = False
        def before_fit(self):
            self.followed = first_weights(self.learn)
            self.k = 0
        def after_batch(self):
            self.k += 1
            decay = min(0.5, self.k/(self.k+9))
            self.followed = self.followed*decay + first_weights(self.learn)*(1-decay)
    learn = small(trained_discs)
    follow = Follow()
    train(learn, 2, 1e-2, [follow, EMA(0.5)])
    assert follow.k==8 and torch.allclose(first_weights(learn), follow.followed, atol=1e-6)

def test_ema_validates_with_the_mean_and_trains_on_with_the_raw_weights(trained_discs):
    class Peek(Callback):
        order = 90
        def before_fit(self): self.trained,self.validated = [], []
        def before_train(self): self.trained.append(first_weights(self.learn))
        def before_validate(self): self.validated.append(first_weights(self.learn))
    def _watch(*cbs):
        set_seed(3)
        learn = small(trained_discs)
        peek = Peek()
        train(learn, 3, 1e-2, [peek, *cbs])
        return peek
    plain,ema = _watch(), _watch(EMA(0.9))
    assert len(ema.trained)==3 and all(torch.equal(a, b) for a,b in zip(plain.trained, ema.trained))
    assert not torch.equal(plain.validated[1], ema.validated[1])

def test_ema_starts_anew_with_each_training(trained_discs):
    learn = small(trained_discs)
    ema = EMA(0.9)
    train(learn, 1, 1e-2, ema)
    torch.nn.init.zeros_(next(learn.model.parameters()))
    train(learn, 1, 1e-9, ema)
    assert first_weights(learn).abs().max()<1e-3

def test_ema_takes_up_what_it_kept(trained_discs):
    learn = small(trained_discs)
    ema,new = EMA(0.9), EMA(0.9)
    train(learn, 1, 1e-2, ema)
    new.learn = learn
    new.before_fit()
    new.load_state_dict(ema.state_dict())
    assert new.steps==4 and all(torch.equal(a, b) for a,b in zip(new.average.values(), ema.average.values()))

# --- Recipe

class Count(Callback):
    "A user's own callback, which counts batches from its making on"
    def __init__(self): self.batches = 0
    def after_batch(self): self.batches += 1

def test_a_training_leaves_the_callbacks_of_the_caller_as_they_were(trained_discs):
    mine = EMA(0.9), Count()
    recipe = Recipe(callbacks=mine)
    before = [dict(vars(cb)) for cb in mine]
    for _ in range(2):
        copies = recipe.make_callbacks(None, SIZE, 4, standard_augment)
        train(small(trained_discs), 1, 1e-2, copies)
        assert copies[1].batches==5  # four batches of four, and one of validation
    assert [vars(cb) for cb in mine]==before and recipe.callbacks==mine

def test_without_mixed_batches_a_batch_is_labelled_and_pseudo_labels_need_no_loader():
    recipe = Recipe(callbacks=(EMA(),))
    assert recipe.batch_sizes(8)==(8, 0)
    assert [type(cb) for cb in recipe.make_callbacks(None, SIZE, 8, standard_augment)]==[EMA]

def test_mixed_batches_put_a_mixer_with_a_loader_of_their_share_before_the_callbacks(monkeypatch):
    monkeypatch.setattr(R, 'pseudo_loader', lambda *args: args)
    recipe = Recipe(mix=MixedBatches(0.75), callbacks=(HardLabels(), EMA()))
    mixer,*rest = recipe.make_callbacks('annotations', SIZE, 8, standard_augment, 'cache')
    assert recipe.batch_sizes(8)==(2, 6)
    assert type(mixer)==BatchMixer and mixer.loader==('annotations', SIZE, 6, standard_augment, 'cache')
    assert [type(cb) for cb in rest]==[HardLabels, EMA]

def test_a_list_of_pieces_is_a_recipe_with_each_piece_in_its_place():
    select,mix,hard,mine = TopReliable(), MixedBatches(0.3), HardLabels(), Count()
    recipe = get_recipe([hard, select, mine, mix])
    assert recipe==Recipe(select, mix, (hard, mine))
    assert repr(recipe)=='TopReliable(share=0.8), MixedBatches(share=0.3), HardLabels(), Count'
    assert get_recipe(recipe) is recipe

def test_named_recipes_go_by_their_names_in_any_spelling():
    for name in recipes: assert get_recipe(f' {name.upper()}') is recipes[name]
    assert repr(recipes['naive'])=='naive'
    assert repr(recipes['default'])=='MixedBatches(share=0.5), HardLabels()'

def test_replace_gives_another_recipe_and_leaves_the_first():
    default = recipes['default']
    other = default.replace(rounds=2, mix=MixedBatches(0.75))
    assert (other.rounds, other.mix.share, default.rounds, default.mix.share)==(2, 0.75, 1, 0.5)
    assert other.callbacks==default.callbacks and repr(other).endswith('rounds=2')
    with pytest.raises(dataclasses.FrozenInstanceError): default.rounds = 2

def test_a_piece_of_ones_own_needs_only_add_to():
    class First:
        def select(self, ann): return Annotations(ann.out, ann.rows[:1], [])
        def add_to(self, recipe): return recipe.add(select=self)
    first = First()
    assert get_recipe([first]).select is first
    with pytest.raises(ValueError, match='twice'): get_recipe([TopReliable(), first])

def test_what_is_no_recipe_is_refused_with_the_reason():
    mix = MixedBatches()
    cases = [('nave', "Did you mean 'naive'"), ([StrongAugment()], 'needs MixedBatches'), ([mix, mix], 'twice'), ([EMA(), EMA(0.5)], 'twice'),
        ([MixedBatches], 'not a piece'), ([EMA], 'not a piece'), (['MixedBatches'], 'not a piece'), ([mix, 3], '3 is not a piece'),
        (3, 'recipe is 3'), (None, 'recipe is None')]
    for bad,message in cases:
        with pytest.raises(ValueError, match=message): get_recipe(bad)
    for fields,message in ((dict(rounds=0), 'rounds is 0'), (dict(rounds=1.5), 'rounds is 1.5'), (dict(callbacks=(CutMix(),)), 'needs MixedBatches')):
        with pytest.raises(ValueError, match=message): Recipe(**fields)

def test_shares_and_decays_outside_0_to_1_are_refused():
    for piece in (TopReliable, EMA):
        for value in [0, -0.1, 1.1, float('nan'), '0.5', True, None]:
            with pytest.raises(ValueError, match='expected a number above 0 and at most 1'): piece(value)
