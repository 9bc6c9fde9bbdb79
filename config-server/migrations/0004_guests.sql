-- Virtual machines that a machine is the host of, as its agent reported them last: JSON.
ALTER TABLE parts ADD COLUMN guests TEXT NOT NULL DEFAULT '[]';
