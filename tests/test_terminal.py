"""The command line on terminals of any width and in pipes: every number is there, and nothing is cut."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from helpers.commands import SMALL, a_quick_command
from rich.console import Console

from tengrad_triton.recipes.cli.autotune import table_of
from tengrad_triton.recipes.cli.commands import COMMANDS
from tengrad_triton.recipes.cli.main import main
from tengrad_triton.recipes.cli.train import outcome_table
from tengrad_triton.recipes.reports.comparison import OUTCOME, outcomes
from tengrad_triton.recipes.terminal import UNBOUNDED, new_console
from tengrad_triton.recipes.training.metrics import EpochMetrics, Record, Steps
from tengrad_triton.recipes.training.progress import Progress
from tengrad_triton.tuning.plan import Measured, Plan
