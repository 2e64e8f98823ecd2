"""What a training step takes, before anything is loaded: on this machine, on a card that is not here, in a budget."""

from edgejax.plan.accelerator import find_accelerator as find_accelerator
from edgejax.plan.accelerator import plan_for_accelerator as plan_for_accelerator
from edgejax.plan.candidate import Candidate as Candidate
from edgejax.plan.card import plan_for_card as plan_for_card
from edgejax.plan.footprint import Footprint as Footprint
from edgejax.plan.footprint import compile_footprint as compile_footprint
from edgejax.plan.search import Option as Option
from edgejax.plan.search import Plan as Plan
