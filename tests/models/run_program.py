"""Runs a program that takes torchvision: ``run_program.py PROGRAM ARGUMENTS``."""

import runpy
import sys

import vision_ops

if __name__ == "__main__":
    vision_ops.provide()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
