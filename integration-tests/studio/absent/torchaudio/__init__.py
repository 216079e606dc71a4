"""What DiffSynth-Studio imports of torchaudio, which has no build here."""
