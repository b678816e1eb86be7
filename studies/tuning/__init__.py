"""The study behind docs/tuning.md: TENGraD's settings changed one at a time, and what each change did."""
