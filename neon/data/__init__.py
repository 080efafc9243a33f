"""Images and what is made of them: sets on disk, encoded examples, augmentation."""
