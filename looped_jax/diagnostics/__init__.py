"""Diagnosis of a trained run: token measurements, weight statistics, figures; and runs compared."""
