-- Of a volume: the disk at the target server that it adopts; empty for none.
ALTER TABLE volumes ADD COLUMN adopt TEXT NOT NULL DEFAULT '';
-- After a failover: the group that protects what runs in this one's place; empty for none.
ALTER TABLE protection_groups ADD COLUMN reversed_by TEXT NOT NULL DEFAULT '';
