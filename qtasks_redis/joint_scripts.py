"""The Lua scripts of the joint composition: each changes messages and records in one step."""

from __future__ import annotations

from qtasks_redis.record_scripts import SAVING
from qtasks_redis.scripts import QUEUES, Script

SUBMIT = Script(
    QUEUES
    + SAVING
    + """
-- KEYS: the set of pairs, the groups of the records, the queues. ARGV: what is sent, and two for
-- each message: its record, the message. Sent for each message: what `save` needs, the position of
-- its queue in KEYS, its delay, and `once` if a message that has a record must not be published.
-- Returns for each 1, or the record that has the uuid already.
local answers = {}
for i = 1, (#ARGV - 1) / 2 do
  local a = (i - 1) * (SAVED + 3) + ITEMS
  local uuid, m = sent[a], a + SAVED
  local key = RECORD .. uuid
  local there = sent[m + 2] == 'once' and redis.call('GET', key)
  if not there then
    enqueue(sent[m], sent[m + 1], ARGV[i * 2 + 1])
    -- A first record replaces no other.
    if redis.call('SET', key, ARGV[i * 2], 'NX') then
      index(KEYS[sent[a + 1]], sent[a + 2], uuid)
    end
  end
  answers[i] = there or 1
end
finish()
return answers
"""
)

COMPLETE = Script(
    QUEUES
    + SAVING
    + """
-- KEYS: the set of pairs, the groups of the records, the queues. ARGV: what is sent, and for each
-- completion the message if it is a retry, and the record if there is one. Sent for each: the first
-- five arguments of `settle` (position 0: no settlement), and what `save` needs (uuid '': no
-- record). A retry is recorded only if it took effect. Returns two for each: the answer of `save`
-- and the answer of `settle`, 0 if it was not called.
local answers, lifted_record, next_value = {}, false, 2
for s = ITEMS, #sent, 5 + SAVED do
  local at, what, record = sent[s], sent[s + 2], s + 5
  local saved, settled, message, value = 0, 0, nil, nil
  if what == 'retry' then
    message = ARGV[next_value]
    next_value = next_value + 1
  end
  if sent[record] ~= '' then
    value = ARGV[next_value]
    next_value = next_value + 1
    lifted_record = lifted_record or lift_record(RECORD .. sent[record], value)
  end
  if message then settled = settle(at, sent[s + 1], what, sent[s + 3], sent[s + 4], message) end
  if value and (not message or settled == 1) then saved = save(record, value) end
  if at > 0 and not message then settled = settle(at, sent[s + 1], what) end
  answers[#answers + 1] = saved
  answers[#answers + 1] = settled
end
delete_settled()
finish()
return answers
"""
)
