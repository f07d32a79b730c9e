{{- define "websocket-relay.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimAll "-" -}}
{{- end -}}

{{- define "websocket-relay.fullname" -}}
{{- $name := include "websocket-relay.name" . -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- /* 53, so that a suffix fits, too */ -}}
{{- default $full .Values.fullnameOverride | trunc 53 | trimAll "-" -}}
{{- end -}}

{{- define "websocket-relay.serviceAccountName" -}}
{{- $own := ternary (include "websocket-relay.fullname" .) "default" .Values.serviceAccount.create -}}
{{- default $own .Values.serviceAccount.name -}}
{{- end -}}

{{- define "websocket-relay.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default $.Chart.AppVersion .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The labels of all objects, whatever their component. */ -}}
{{- define "websocket-relay.instanceLabels" -}}
app.kubernetes.io/name: {{ include "websocket-relay.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* Select the relays' pods, not the pod of `helm test`. Never changed: a Deployment's selector is immutable. */ -}}
{{- define "websocket-relay.selectorLabels" -}}
{{ include "websocket-relay.instanceLabels" . }}
app.kubernetes.io/component: relay
{{- end -}}

{{- define "websocket-relay.testLabels" -}}
{{ include "websocket-relay.instanceLabels" . }}
app.kubernetes.io/component: test
{{- end -}}

{{- /* Labels that change with a release, and so are not part of a selector. */ -}}
{{- define "websocket-relay.releaseLabels" -}}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "websocket-relay.labels" -}}
{{ include "websocket-relay.selectorLabels" . }}
{{ include "websocket-relay.releaseLabels" . }}
{{- end -}}

{{- define "websocket-relay.path" -}}
{{- .Values.config.server.base_path | default "/" -}}
{{- end -}}

{{- /* Probes use the metrics port, which has no TLS, or the relay's port if there is no metrics port. */ -}}
{{- define "websocket-relay.probe" -}}
httpGet:
  path: {{ .path }}
  {{- with .root.Values.config }}
  {{- if .metrics.enabled }}
  port: metrics
  {{- else }}
  port: websocket
  scheme: {{ ternary "HTTPS" "HTTP" .server.tls.enabled }}
  {{- end }}
  {{- end }}
{{ toYaml .times }}
{{- end -}}

{{- /* The relay ends after shutdown.timeout_s at the latest; the kubelet has to wait longer. */ -}}
{{- define "websocket-relay.gracePeriod" -}}
{{- $computed := add (.Values.config.shutdown.timeout_s | float64 | ceil) 5 -}}
{{- if kindIs "invalid" .Values.terminationGracePeriodSeconds -}}
{{ $computed }}
{{- else -}}
{{ .Values.terminationGracePeriodSeconds | int }}
{{- end -}}
{{- end -}}

{{- define "websocket-relay.minReadySeconds" -}}
{{- $shutdown := .Values.config.shutdown -}}
{{- if kindIs "invalid" .Values.minReadySeconds -}}
{{ addf $shutdown.readiness_delay_s $shutdown.spread_s | ceil }}
{{- else -}}
{{ .Values.minReadySeconds | int }}
{{- end -}}
{{- end -}}

{{- /* memory, redis, rediss, valkey, valkeys, nats or tls; empty if the address is in a Secret. */ -}}
{{- define "websocket-relay.backplane" -}}
{{- if not .Values.secrets.backplaneUrl.name -}}
{{ regexFind "^[a-z]+" .Values.config.backplane.url }}
{{- end -}}
{{- end -}}

{{- /* The ports in config.backplane.url, which may list several servers, as a JSON list. */ -}}
{{- define "websocket-relay.brokerPorts" -}}
{{- $usual := dict "redis" 6379 "rediss" 6379 "valkey" 6379 "valkeys" 6379 "nats" 4222 "tls" 4222 -}}
{{- $scheme := include "websocket-relay.backplane" . -}}
{{- $ports := list -}}
{{- range .Values.networkPolicy.broker.ports -}}
{{- $ports = append $ports (int .) -}}
{{- end -}}
{{- if and (not $ports) (hasKey $usual $scheme) -}}
{{- $usualPort := get $usual $scheme -}}
{{- /* The address names the Sentinels; they name the Redis. */ -}}
{{- if regexMatch "^[a-z]+[+]sentinel:" .Values.config.backplane.url -}}
{{- $ports = append $ports $usualPort -}}
{{- $usualPort = 26379 -}}
{{- end -}}
{{- $servers := regexReplaceAll "^[a-z+]+://|[/?].*$" .Values.config.backplane.url "" -}}
{{- range splitList "," $servers -}}
{{- $ports = append $ports (regexFind "[0-9]+$" (regexFind ":[0-9]+$" .) | default $usualPort | int) -}}
{{- end -}}
{{- end -}}
{{- uniq $ports | toJson -}}
{{- end -}}
