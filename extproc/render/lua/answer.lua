-- The way back, at the listener: failures of providers become one clear answer, and a usage event that the client did
-- not ask for is taken out of its stream. Runs on every response and touches none that has nothing to mend.

local DECISION, ATTEMPTS, USAGE = "extproc.decision", "extproc.attempts", "extproc.usage"
-- A usage event is a few hundred bytes. One that is longer than this and still undecided is let through.
local LONGEST_HELD = 16384
-- The last event of OpenAI's responses holds the whole answer, and its usage. What is longer than this is not read.
local LONGEST_READ = 1048576
local LONGEST_WAIT_S = 604800

local ERRORS = {
  all_targets_failed = { status = "503", openai = "server_error", anthropic = "overloaded_error" },
  rate_limited = { status = "429", openai = "rate_limit_error", anthropic = "rate_limit_error" },
  provider_auth = { status = "502", openai = "server_error", anthropic = "api_error" },
  gateway_unavailable = { status = "503", openai = "server_error", anthropic = "api_error" },
}

local function quoted(text)
  local escaped = string.gsub(text, '[%c"\\]', function(char) return string.format("\\u%04x", string.byte(char)) end)
  return '"' .. escaped .. '"'
end

local function body_of(code, message, decision)
  local id = decision["request_id"] or ""
  local kind = ERRORS[code]
  if decision["dialect"] == "anthropic" then
    return '{"type":"error","error":{"type":' .. quoted(kind.anthropic) .. ',"message":' .. quoted(message)
      .. ',"code":' .. quoted(code) .. '},"request_id":' .. quoted(id) .. "}"
  end
  return '{"error":{"message":' .. quoted(message .. " (request id: " .. id .. ")") .. ',"type":' .. quoted(kind.openai)
    .. ',"param":null,"code":' .. quoted(code) .. "}}"
end

-- A Retry-After in seconds, or nil; a date is taken for none (RFC 9110 10.2.3 allows both, providers send seconds).
local function seconds(text)
  local number = tonumber(text and string.match(text, "^%d+%.?%d*$"))
  return number and number <= LONGEST_WAIT_S and math.ceil(number) or nil
end

-- What the attempts came to: the code, the message, and how long to wait (seconds, or nil).
local function verdict(status, made)
  local count = made and made["n"] or 0
  if count == 0 then return "gateway_unavailable", "The gateway could not reach a provider.", nil end
  if status == "401" or status == "403" then
    return "provider_auth", "The provider " .. made["p" .. count] .. " refused the gateway's credential.", nil
  end
  local tried, limited, wait = {}, 0, nil
  for number = 1, count do
    local answer = made["s" .. number]
    tried[number] = made["p" .. number] .. " (" .. (answer or "no answer") .. ")"
    local retry_after = seconds(made["r" .. number])
    if retry_after and (wait == nil or retry_after < wait) then wait = retry_after end
    if answer == "429" then limited = limited + 1 end
  end
  local names = table.concat(tried, ", ")
  if limited == count then return "rate_limited", "Every provider is rate limited: " .. names .. ".", wait end
  return "all_targets_failed", "Every provider failed: " .. names .. ".", wait
end

local function is_failure(status)
  return status == "401" or status == "403" or status == "408" or status == "429" or status >= "500"
end

-- The text goes into metadata, and a mark on the headers: the filter `mended` (render/mended) says it, at once.
local function mend(handle, metadata, decision, status)
  local code, message, wait = verdict(status, metadata:get(ATTEMPTS))
  metadata:set(ATTEMPTS, "code", code)
  metadata:set(ATTEMPTS, "answer", body_of(code, message, decision))
  if wait then metadata:set(ATTEMPTS, "wait", tostring(wait)) end
  handle:headers():replace(":status", ERRORS[code].status)
  handle:headers():replace("x-extproc-mended", wait and "wait" or "now")
end

-- Where the value of `key` begins in the JSON object that opens at `from`, or nil and where the object ends. Strings are skipped and depth is
-- counted, so that neither a text nor a tool's schema that a client chose is taken for the provider's own word.
local function member(text, from, key)
  local depth, at = 0, from
  while true do
    local place = string.find(text, '[{}%[%]"]', at)
    if place == nil then return nil end
    local char = string.byte(text, place)
    if char == 34 then -- a string: to its end
      local stop = place + 1
      while true do
        stop = string.find(text, '["\\]', stop)
        if stop == nil then return nil end
        if string.byte(text, stop) == 34 then break end
        stop = stop + 2
      end
      if depth == 1 and string.sub(text, place + 1, stop - 1) == key then
        local value = string.match(text, "^%s*:%s*()", stop + 1)
        if value then return value end
      end
      at = stop + 1
    else
      depth = depth + ((char == 123 or char == 91) and 1 or -1)
      if depth == 0 then return nil, place end
      at = place + 1
    end
  end
end

local function string_at(text, at)
  return at and string.match(text, '^"([^"\\]*)"', at)
end

local function first_number(text, names)
  for _, name in ipairs(names) do
    local number = tonumber(string.match(text, '"' .. name .. '"%s*:%s*(%d+)'))
    if number ~= nil then return number end
  end
  return nil
end

local function tells_usage(text)
  return string.find(text, '"usage"', 1, true) ~= nil and string.find(text, '"usage"%s*:%s*{') ~= nil
end

-- An event's data lines, joined as SSE has it; white space between JSON's parts, where a line is cut, means nothing.
local function data_of(event)
  local lines = {}
  for line in string.gmatch(event, "[^\r\n]+") do
    lines[#lines + 1] = string.match(line, "^data:(.*)$")
  end
  return string.match(table.concat(lines, "\n"), "^%s*(.*)$")
end

local function is_whole(data)
  local _, stop = member(data, 1, nil)
  return stop ~= nil and string.find(data, "^%s*$", stop + 1) ~= nil
end

-- An OpenAI stream's usage event: a usage object, and no choices.
local function is_usage_alone(data)
  if string.byte(data, 1) ~= 123 then return false end
  local choices, usage = member(data, 1, "choices"), member(data, 1, "usage")
  return choices ~= nil and usage ~= nil and string.find(data, "^%[%s*%]", choices) ~= nil
    and string.byte(data, usage) == 123 and is_whole(data)
end

-- Whether the beginning of an event already rules out that it is one.
local function is_other(held)
  if #held > LONGEST_HELD then return true end
  local first = string.match(held, "^data:%s*(%S)") or string.match(held, "[\r\n]data:%s*(%S)")
  if first ~= nil and first ~= "{" then return true end
  return string.find(held, '"choices"%s*:%s*%[%s*[^%]%s]') ~= nil
end

local RESPONSE_ENDS = {
  ["response.completed"] = true, ["response.incomplete"] = true, ["response.failed"] = true,
  ["response.cancelled"] = true,
}

-- Many clients hang up at [DONE], before the stream's end, where Envoy's AI filter publishes. So what an event says of
-- usage is noted as it passes; a later event replaces an earlier. Returns whether it said any, and whether nothing is to
-- come but the end.
local function note_usage(handle, data, dialect)
  if string.byte(data, 1) ~= 123 then return false, false end
  -- Where the usage stands: chat and completions in the event itself, the others in what the event is about.
  local inside = member(data, 1, "response") or member(data, 1, "message") or 1
  local at = member(data, inside, "usage")
  local usage = at and string.match(data, "^%b{}", at)
  if usage == nil then return false, false end
  local input = first_number(usage, { "prompt_tokens", "input_tokens" })
  local output = first_number(usage, { "completion_tokens", "output_tokens" })
  if input == nil and output == nil then return false, false end
  local metadata = handle:streamInfo():dynamicMetadata() -- one got before the last chunk is no longer valid
  local cached = first_number(usage, { "cached_tokens", "cache_read_input_tokens" })
  local written = first_number(usage, { "cache_creation_input_tokens", "cache_write_tokens" })
  if input ~= nil then
    -- Anthropic counts cached and written tokens beside the input, the others within it.
    if dialect == "anthropic" then input = input + (cached or 0) + (written or 0) end
    metadata:set(USAGE, "input_tokens", input)
    metadata:set(USAGE, "cached_tokens", cached or 0)
    metadata:set(USAGE, "cache_write_tokens", written or 0)
  end
  if output ~= nil then metadata:set(USAGE, "output_tokens", output) end
  local reasoning = first_number(usage, { "reasoning_tokens" })
  if reasoning ~= nil then metadata:set(USAGE, "reasoning_tokens", reasoning) end
  local model = string_at(data, member(data, inside, "model"))
  if model ~= nil then metadata:set(USAGE, "model", model) end
  local kind = string_at(data, member(data, 1, "type"))
  local ends = kind == "message_delta" or RESPONSE_ENDS[kind] or is_usage_alone(data)
  if ends then metadata:set(USAGE, "whole", true) end
  return true, ends
end

local function is_done(event)
  return string.find(event, "^data:%s*%[DONE%]") ~= nil or string.find(event, "[\r\n]data:%s*%[DONE%]") ~= nil
end

-- The server-sent events of one response, cut by line ends of all three kinds (WHATWG HTML 9.2.5) across any chunking.
-- `feed` takes a chunk and returns the bytes to pass on: all of them unless `hide`, and then only an event that may yet
-- be the usage event is held back. Comment lines before an event keep connections alive and are no part of it. `finish`
-- returns what is held when the stream ends without the empty line that closes its last event.
local function new_reader(handle, dialect, hide)
  local parts, size, passing = {}, 0, false -- the event under way, and whether its bytes have left
  local line_starts, after_cr, sink = true, false, "out"
  local noted, whole = false, false

  local function heard(event)
    if tells_usage(event) then
      local said, ends = note_usage(handle, data_of(event), dialect)
      noted, whole = noted or said, whole or ends
    elseif noted and not whole and is_done(event) then
      handle:streamInfo():dynamicMetadata():set(USAGE, "whole", true)
      whole = true
    end
  end

  local function close(out)
    local event = size <= LONGEST_READ and table.concat(parts) or ""
    heard(event)
    local hidden = hide and not passing and tells_usage(event) and is_usage_alone(data_of(event))
    if not passing and not hidden then out[#out + 1] = event end
    parts, size, passing = {}, 0, false
    return hidden
  end

  local function add(piece, out)
    if passing then out[#out + 1] = piece end
    parts[#parts + 1] = piece
    size = size + #piece
    if size > LONGEST_READ then
      if not passing then out[#out + 1] = table.concat(parts) end
      parts, passing = {}, true
    end
  end

  local function put(piece, out)
    if sink == "event" then
      add(piece, out)
    elseif sink == "out" then
      out[#out + 1] = piece
    end
  end

  -- Events that end with this chunk, as they nearly always do, and say nothing of interest.
  local function is_plain(text)
    if size > 0 or not line_starts or after_cr then return false end
    if string.sub(text, -2) ~= "\n\n" and string.sub(text, -4) ~= "\r\n\r\n" then return false end
    return not tells_usage(text) and not (noted and not whole)
  end

  local function feed(text)
    if is_plain(text) then return text end
    local out, at, length = {}, 1, #text
    if after_cr and length > 0 then
      after_cr = false
      if string.byte(text, 1) == 10 then -- the second half of a line end that the last chunk began
        put("\n", out)
        at = 2
      end
    end
    while at <= length do
      local stop = string.find(text, "[\r\n]", at)
      local blank = line_starts and stop == at
      if line_starts then
        local is_comment = size == 0 and string.byte(text, at) == 58
        sink = is_comment and "out" or "event"
      end
      line_starts = stop ~= nil
      if stop ~= nil and string.byte(text, stop) == 13 then
        if string.byte(text, stop + 1) == 10 then stop = stop + 1 else after_cr = stop == length end
      end
      put(string.sub(text, at, stop or length), out)
      if blank then sink = close(out) and "nowhere" or "out" end
      at = (stop or length) + 1
    end
    if size > 0 and not passing and (not hide or is_other(table.concat(parts))) then
      out[#out + 1] = table.concat(parts)
      passing = true
    end
    return table.concat(out)
  end

  local function finish()
    local out = {}
    if size > 0 then close(out) end
    return table.concat(out)
  end

  return feed, finish
end

local function read_stream(handle, dialect, hide)
  local feed, finish = new_reader(handle, dialect, hide)
  local last, kept = nil, ""
  for chunk in handle:bodyChunks() do
    local size = chunk:length()
    local text = size > 0 and chunk:getBytes(0, size) or ""
    last, kept = chunk, feed(text)
    if hide and kept ~= text then chunk:setBytes(kept) end
  end
  local rest = finish()
  -- The last chunk is still at hand here, unless trailers came after it.
  if hide and rest ~= "" and last ~= nil then pcall(last.setBytes, last, kept .. rest) end
end

function envoy_on_response(handle)
  local metadata = handle:streamInfo():dynamicMetadata()
  local decision = metadata:get(DECISION)
  if decision == nil or decision["path"] == nil then return end -- refused by decide: the answer is whole
  local headers = handle:headers()
  local status = headers:get(":status")
  if is_failure(status) then
    mend(handle, metadata, decision, status)
    return
  end
  if decision["stream"] and string.find(headers:get("content-type") or "", "text/event-stream", 1, true)
    and (headers:get("content-encoding") or "identity") == "identity" then
    local hide = decision["hide_usage"] == true
    if hide then headers:remove("content-length") end
    read_stream(handle, decision["dialect"], hide)
  end
end
