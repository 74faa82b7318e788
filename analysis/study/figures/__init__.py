"""One function per figure: rows in, matplotlib figure out."""

from study.figures.ablations import ablation_dots
from study.figures.attention import (
    attention_stack,
    change_by_layer,
    course_by_task,
    focus,
    head_heat,
    layer_step_heat,
    three_measures,
    token_kinds,
    tokens_on_image,
)
from study.figures.comparison import loss_heat, pareto
from study.figures.dynamics import forest, mean_schedules
from study.figures.efficiency import decode_reads, saving_realised, share_by_text
from study.figures.errata import macs_by_retention, mixed_protocols, swapped_columns
from study.figures.fine_grained import compared_with_constants, detail_curves
from study.figures.headroom import gains_by_ranking, loss_by_cost
from study.figures.importance import (
    agreement_by_layer,
    agreement_of_rankings,
    importance_maps,
    score_by_agreement,
    score_under_noise,
)
from study.figures.laboratories import methods_against_random, ranking_by_layer, task_needs
from study.figures.masks import kept_patches
from study.figures.predictor import (
    budget_met,
    gradient_truth,
    loss_by_retention,
    predictor_weights,
    rates_by_image,
    rates_over_steps,
    signs_of_failure,
    training_curves,
)
from study.figures.recipes import gradient_slopes, recipe_gains, variant_gains
